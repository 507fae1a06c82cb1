"""Programs of SGLang's frontend language on a server with STEP.

sgl.set_default_backend(step_sglang.client.frontend.endpoint("http://127.0.0.1:30000"))

@sgl.function
def solve(s, question):
    s += sgl.user(question)
    forks = s.fork(16)
    forks += sgl.assistant(sgl.gen("answer", max_tokens=4096))
    s["winner"] = vote(forks, "answer").answer
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from step_sglang import protocol
from step_sglang.client.http import known_key, server_url
from step_sglang.scoring.calibration import calibration_of
from step_sglang.voting.answers import Extractor, extract_boxed
from step_sglang.voting.classes import Same
from step_sglang.voting.families import lineage_of
from step_sglang.voting.tally import Ballot, Tally, check_vote, share_of, tallying, weight_of
from step_sglang.voting.verifier import AnswerVerifier

_verifier = AnswerVerifier()


@dataclass(frozen=True)
class ForkVote:
    """A vote over forks. ``answer`` None: no fork finished with an answer."""

    answer: str | None
    share: float  # of the weight
    fork: int | None  # position of the best-scoring fork that gave the answer
    answers: tuple[Tally, ...]  # all answers, the winner first; members are positions of forks
    errors: dict[int, str]  # why a fork has no vote: pruned, failed


def endpoint(url: str, **options: Any) -> Any:
    """A backend for ``sgl.set_default_backend``: the forks of one ``fork(n)`` are one group.

    Several ``gen`` calls of one fork continue the same trace and its score; nested forks are groups
    of their own. A fork that fails or is pruned ends by itself and leaves its siblings alone.

    Args:
        url: a server started with ``--enable-step``; with or without a trailing ``/v1``.
        options: of SGLang's ``RuntimeEndpoint`` (``api_key``, ``verify``, ``chat_template_name``).
    """
    # Late, because this package itself never imports the engine.
    from step_sglang.patches.frontend import StepEndpoint

    options["api_key"] = known_key(options.get("api_key"))
    return StepEndpoint(server_url(url), **options)


def vote(
    forks: Any,
    name: str,
    *,
    vote: str = protocol.DEFAULT_VOTE,
    extract: Extractor | None = None,
    same: Same | None = None,
) -> ForkVote:
    """Vote over what forks generated; waits for them.

    Args:
        forks: what ``s.fork(n)`` returned, or a list of states.
        name: the variable of their last ``gen``.
        vote: ``calibrated``, ``weighted`` by trace score, ``majority`` or ``best``, see
            :func:`step_sglang.client.solve.solve`. On a server without STEP all forks weigh the
            same.
        extract: reads the answer of all the text of a fork, from where it began; it returns None
            when there is none. Default: the last boxed answer, else the text of the last ``gen``,
            which in a program often is the answer itself.
        same: whether two answers mean the same; default: math-verify, in a child process.

    Raises:
        VoteError: there is no such vote.
    """
    check_vote(vote)
    states: Sequence[Any] = getattr(forks, "states", forks)
    ballots: list[Ballot] = []
    voters: list[int] = []
    scores: dict[int, float] = {}
    errors: dict[int, str] = {}
    for index, state in enumerate(states):
        info = state.get_meta_info(name)
        problem = _problem(info)
        answer = None if problem else _answer(state, name, extract)
        if answer is None:
            errors[index] = problem or "no answer in its text"
            continue
        step = info.get(protocol.META_KEY) or {}
        score = step.get(protocol.META_SCORE)
        calibration = calibration_of(step.get(protocol.META_CALIBRATION))
        scores[index] = -1.0 if score is None else score
        ballots.append(Ballot(answer, weight_of(score, vote, calibration), lineage_of(info)))
        voters.append(index)
    answers = tuple(
        Tally(t.answer, t.weight, tuple(voters[i] for i in t.members))
        for t in _verifier.comparison().run(tallying(ballots, vote, same))
    )
    if not answers:
        warnings.warn(_why_none(errors), stacklevel=2)
        return ForkVote(None, 0.0, None, (), errors)
    best = max(answers[0].members, key=lambda index: scores[index])
    return ForkVote(answers[0].answer, share_of(answers), best, answers, errors)


def _answer(state: Any, name: str, extract: Extractor | None) -> str | None:
    """The answer of a fork: its reasoning may have ended in an earlier ``gen`` than its last."""
    begin = getattr(state.stream_executor, "fork_start_text_pos", None) or 0
    whole = state.text()[begin:]
    if extract is not None:
        return extract(whole)
    return extract_boxed(whole) or str(state.get_var(name)).strip() or None


def _why_none(errors: dict[int, str]) -> str:
    reasons = Counter(errors.values()).most_common(3)
    shown = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "there are no forks"
    return f"the vote over {len(errors)} forks has no answer: {shown}"


def _problem(info: dict[str, Any] | None) -> str:
    if info is None:
        return "it generated nothing"
    reason = info.get("finish_reason") or {}
    pruned = (info.get(protocol.META_KEY) or {}).get(protocol.META_PRUNED)
    ended = pruned or reason.get("type") == "abort"
    return str(reason.get("message", "aborted")) if ended else ""
