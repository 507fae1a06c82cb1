"""Refill in a model of the memory, with the embedded reasoner's own text and scores.

    python bench/refill_model.py --out FILE --questions 150 --repeats 2 -n 16

Traces, continuations and step scores are the model's; the policy, the rules of refill and the votes
are the server's; memory and passes are simulated: one group at a time in a pool of a quarter of
its traces, pages of one token, one token a pass, and a pass more for every prefill of branches.
All methods prune the same traces, so that their differences are those of the decisions alone. The
controls without branches are those of `step-sglang replay`. Nothing is timed: "passes" is a
group's time where each pass takes the same, "attended" what memory reads it costs (KV tokens, all
passes).

A method whose name ends in `-early` ends by the posterior rule, in which a free place is open, too.
`--refilled` also takes variants that no method of the server has: `swaps` swaps the worst trace for
a branch of the best every 32 passes, `no slack` starts no branch that is expected to outlast the
group, and a horizon bounds when a branch is expected to end since the group began, in lengths of a
trace. A run that was stopped goes on; `--report` only shows what a file has.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resumed import reported, resumed, rewrite
from scored_traces import MAX_NEW, ScoredTrace, TraceSource

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.profiles import profile_of
from step_sglang.evaluation.replay import is_right, simulate
from step_sglang.evaluation.stats import compare, mean_of
from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace
from step_sglang.protocol import DEFAULT_VOTE
from step_sglang.pruning.policy import Candidates, GroupView, TraceView
from step_sglang.pruning.refill import (
    RULES,
    Boundary,
    RefillRules,
    RefillView,
    Room,
    SourceView,
    choose_branches,
    choose_swaps,
)
from step_sglang.reasoner import NAME, NAME_DWELLING, Question
from step_sglang.reasoner.task import question_stream
from step_sglang.voting.early_stopping import highest_weight, is_settled
from step_sglang.voting.families import Lineage
from step_sglang.voting.session import VoteRules
from step_sglang.voting.tally import Ballot, Tally, tally, weight_of

_LAG = 2  # a step's score is known when the trace has so many tokens more than its position
_PASSES = CostModel(base=1.0, per_trace=0.0, per_token=0.0, overhead=0.0)
_READS = CostModel(base=0.0, per_trace=0.0, per_token=1.0, overhead=0.0)

CONTROLS = {  # the policy, the vote and when it ends
    "sc": ("none", VoteRules("majority", "off")),
    "random": ("random", VoteRules(DEFAULT_VOTE, "off")),
    "longest": ("longest", VoteRules(DEFAULT_VOTE, "off")),
    "step": ("fair", VoteRules(DEFAULT_VOTE, "off")),
    "step-early": ("fair", VoteRules(DEFAULT_VOTE, "posterior")),
}
_BEST = RULES[protocol.REFILL_BEST]
REFILLED: Mapping[str, tuple[str, RefillRules]] = {
    "step-refill": (protocol.REFILL_BEST, _BEST),
    "step-refill-random": (protocol.REFILL_RANDOM, RULES[protocol.REFILL_RANDOM]),
    "gambit": (protocol.REFILL_GAMBIT, RULES[protocol.REFILL_GAMBIT]),
}
VARIANTS: Mapping[str, tuple[str, RefillRules]] = {
    "step-refill, swaps": (protocol.REFILL_BEST, replace(_BEST, swap=1, swap_interval=32)),
    "step-refill, no horizon": (protocol.REFILL_BEST, replace(_BEST, horizon=float("inf"))),
    **{
        f"step-refill, horizon {h:g}": (protocol.REFILL_BEST, replace(_BEST, horizon=h))
        for h in (1.0, 1.1, 1.5)
    },
    "step-refill, no slack": (protocol.REFILL_BEST, replace(_BEST, slack=0.0)),
}


@dataclass(frozen=True)
class Outcome:
    """Of one method on one question once."""

    right: bool
    passes: float
    attended: float  # KV tokens, over all passes
    tokens: int  # generated
    pruned: int
    finished: int
    branches: int
    deepest: int


@dataclass(eq=False)
class Growing:
    """A trace in the model. ``whole``: what it will be if nothing stops it."""

    whole: ScoredTrace
    sums: list[float]
    generated: int = 0
    since: int = 0  # steps: its last branch, or its own begin
    branches: int = 0
    taken: int = 0  # tokens that it began with
    path: tuple[tuple[int, int, int], ...] = ()  # of its ancestors: number, tokens, steps
    number: int = 0  # of all traces of the group

    @property
    def known(self) -> int:
        """Steps whose score is known."""
        return sum(p + _LAG <= self.generated for p in self.whole.positions)

    @property
    def score(self) -> float | None:
        """At its end; None before its first step."""
        return self.sums[-1] / len(self.sums) if self.sums else None

    def view(self, handle: int, running: bool) -> SourceView:
        """For the rules of refill."""
        steps = range(self.known)
        found = [Boundary(self.whole.positions[i], self.sums[i], i + 1) for i in steps]
        return SourceView(
            handle, self.generated, running, found, self.since, len(self.path), self.branches
        )

    def lineage(self) -> Lineage:
        """For the vote."""
        own = (str(self.number), max(1, len(self.whole.positions)))
        return Lineage((*((str(n), steps) for n, _, steps in self.path), own))


def held(running: Sequence[Growing]) -> int:
    """KV tokens of running traces; what several share counts once."""
    reach: dict[int, tuple[int, int]] = {}
    for trace in running:
        begun = 0
        for number, end in (*((n, t) for n, t, _ in trace.path), (trace.number, trace.generated)):
            start, most = reach.get(number, (begun, begun))
            reach[number] = min(start, begun), max(most, end)
            begun = end
    return sum(end - start for start, end in reach.values())


class Group:
    """One group with refill in a pool of its own.

    ``families``: its vote knows them, and is the server's; else it adds up trace scores.
    """

    def __init__(
        self, question: Question, source: TraceSource, families: bool,
        first: Sequence[ScoredTrace], mode: str, rules: RefillRules, room: int, expected: float,
        prompt: int,
    ) -> None:  # fmt: skip
        self._prompt = prompt
        self._question, self._source, self._families = question, source, families
        self._vote = DEFAULT_VOTE if families else "weighted"
        self._name, self._mode, self._rules, self._room = question.question, mode, rules, room
        self._expected, self._began = expected, len(first)
        self.running = [Growing(t, t.sums, number=i) for i, t in enumerate(first)]
        self.finished: list[Growing] = []
        self.places = self.pruned = self.branched = self.tokens = 0
        self.passes = self.attended = self._decided = self._swapped = 0
        self.deepest = 0
        self.early: Outcome | None = None  # where the posterior rule would have ended it

    def run(self) -> Generator[list[ScoredTrace], list[ScoredTrace], None]:
        """Until its last trace has ended; asks for continuations of prefixes."""
        while self.running:
            yield from self._refill()
            self._prune()
            self.passes += 1
            self.attended += sum(self._prompt + trace.generated for trace in self.running)
            self.tokens += len(self.running)
            for trace in self.running:
                trace.generated += 1
            over = [t for t in self.running if t.generated >= len(t.whole.tokens)]
            self.finished += over
            self.running = [t for t in self.running if t not in over]
            if over and self.early is None and self._settled():
                self.early = self.outcome()

    def outcome(self) -> Outcome:
        """As it stands."""
        tallies = self._tallies()
        right = bool(tallies) and tallies[0].answer == self._question.answer
        return Outcome(
            right, self.passes, self.attended, self.tokens, self.pruned, len(self.finished),
            self.branched, self.deepest,
        )  # fmt: skip

    def _tallies(self) -> list[Tally]:
        ballots = [
            Ballot(
                answer,
                weight_of(trace.score, self._vote, self._source.calibration),
                trace.lineage() if self._families else None,
            )
            for trace in self.finished
            if (answer := self._source.answer(trace.whole)) is not None
        ]
        return tally(ballots, same=str.__eq__, vote=self._vote)

    def _settled(self) -> bool:
        spent = self.branched >= self._rules.branches * self._began
        free = 0 if spent or not self.running else self.places
        weights = [
            highest_weight(
                t.sums[t.known - 1] if t.known else 0.0, t.known, MAX_NEW - t.generated,
                self._vote, self._source.calibration,
            )
            for t in self.running
        ]  # fmt: skip
        unborn = [highest_weight(0.0, 0, MAX_NEW, self._vote, self._source.calibration)] * free
        return is_settled(self._tallies(), [*weights, *unborn], self._vote, "posterior")

    def _free(self) -> int:
        return self._room - held(self.running)

    def _prune(self) -> None:
        # Each takes one more token; SGLang's allocator has no more to lose.
        while len(self.running) > self._free():
            views = [
                TraceView(i, 1, t.generated, t.sums[t.known - 1] if t.known else 0.0, t.known)
                for i, t in enumerate(self.running)
            ]
            survivors = len(self.running) + len(self.finished)
            group = GroupView(self._name, survivors, 1, 1.0, views)
            victim = Candidates([group], StepConfig("model")).take()
            assert victim is not None, "the pool is too small for one trace"
            self._lose(self.running[victim.handle])

    def _lose(self, trace: Growing) -> None:
        open_place = len(self.running) > 1 and self.branched < self._rules.branches * self._began
        self.running.remove(trace)
        self.places += open_place
        self.pruned += 1

    def _view(self) -> RefillView:
        sources = [t.view(i, True) for i, t in enumerate(self.running)]
        sources += [t.view(len(sources) + i, False) for i, t in enumerate(self.finished)]
        running = len(self.running)
        return RefillView(
            self._name, self._mode, range(self.places), sources, running, self._began,
            self.branched, running + len(self.finished) - 1, self._expected, age=self.passes,
        )  # fmt: skip

    def _refill(self) -> Generator[list[ScoredTrace], list[ScoredTrace], None]:
        rules = self._rules
        if self.passes - self._decided < rules.interval:
            return
        self._decided = self.passes
        if (rules.swap or rules.floor) and self.passes - self._swapped >= rules.swap_interval:
            self._swapped = self.passes
            gone = [self.running[handle] for handle in choose_swaps(self._view(), rules)]
            for trace in gone:
                self._lose(trace)
        if not self.places:
            return
        room = Room(self._free(), MAX_NEW, len(self.running))
        chosen = choose_branches(self._view(), room, rules)
        if not chosen:
            return
        sources = [*self.running, *self.finished]
        parents = [sources[branch.parent] for branch in chosen]
        whole = yield [
            parent.whole.until(branch.position)
            for parent, branch in zip(parents, chosen, strict=True)
        ]
        self.passes += 1  # the prefill
        for parent, branch, trace in zip(parents, chosen, whole, strict=True):
            steps = sum(p <= branch.position for p in trace.positions)
            self.branched += 1
            path = (*parent.path, (parent.number, branch.position + 1, steps))
            self.deepest = max(self.deepest, len(path))
            self.running.append(
                Growing(
                    trace, trace.sums, branch.position + 1, steps, 0, branch.position + 1, path,
                    self._began + self.branched - 1,
                )
            )  # fmt: skip
            parent.since, parent.branches = steps, parent.branches + 1
        self.places -= len(chosen)


def control(group: RecordedGroup, name: str, pool: int, seed: int) -> Outcome:
    """Of a method without branches, by the model of `replay`."""
    policy, rules = CONTROLS[name]
    fate = simulate(group, policy, pool, _PASSES, seed=seed, rules=rules)
    reads = simulate(group, policy, pool, _READS, seed=seed, rules=rules)
    return Outcome(
        is_right(fate, rules.vote), fate.seconds, reads.seconds, fate.tokens, fate.pruned,
        len(fate.finished), 0, 0,
    )  # fmt: skip


def recorded(
    question: Question, repeat: int, traces: Sequence[ScoredTrace], source: TraceSource
) -> RecordedGroup:
    """Sampled traces as `replay` takes them."""

    def one(trace: ScoredTrace) -> RecordedTrace:
        answer = source.answer(trace)
        return RecordedTrace(
            "finished", answer, answer == question.answer,
            trace.sums[-1] / len(trace.scores) if trace.scores else None,
            (0.0,) * len(trace.tokens), (), trace.positions, trace.scores, "",
        )  # fmt: skip

    prompt = len(source.prompt(question))
    return RecordedGroup(
        question.question, repeat, question.answer, prompt, MAX_NEW, 0.0, tuple(map(one, traces)),
        calibration=source.calibration.pair if source.calibration else None,
    )  # fmt: skip


def results(
    asked: Sequence[Question],
    repeat: int,
    n: int,
    pool: int,
    source: TraceSource,
    refilled: Mapping[str, tuple[str, RefillRules]],
) -> Iterator[tuple[Question, dict[str, Outcome]]]:
    """Every method on these questions once."""
    sampled = source.sample([(question, ScoredTrace()) for question in asked for _ in range(n)])
    found: list[dict[str, Outcome]] = []
    going = []  # groups with branches
    # As the server expects it of traces that finished lately.
    expected = sum(len(trace.tokens) for trace in sampled) / len(sampled)
    for i, question in enumerate(asked):
        first = sampled[n * i : n * (i + 1)]
        whole = recorded(question, repeat, first, source)
        found.append({name: control(whole, name, pool, repeat) for name in CONTROLS})
        room = pool - whole.prompt_tokens
        plain = Group(
            question, source, False, first, protocol.REFILL_OFF, RefillRules(branches=0), room,
            expected, whole.prompt_tokens,
        )  # fmt: skip
        assert not list(plain.run())
        same = found[i]["step"].tokens, found[i]["step"].attended
        assert (plain.tokens, plain.attended) == same, "this model and that of `replay` differ"
        for name, (mode, rules) in refilled.items():
            families = name != "gambit"
            group = Group(
                question, source, families, first, mode, rules, room, expected, whole.prompt_tokens
            )
            going.append((i, name, group, group.run()))
    for i, name, group in _driven(going, asked, source):
        found[i][name] = group.outcome()
        found[i][f"{name}-early"] = group.early or found[i][name]
    yield from zip(asked, found, strict=True)


_Going = tuple[int, str, Group, Generator[list[ScoredTrace], list[ScoredTrace], None]]


def _driven(
    going: list[_Going], asked: Sequence[Question], source: TraceSource
) -> Iterator[tuple[int, str, Group]]:
    """Run groups side by side, so that their branches are sampled together."""
    answers: list[list[ScoredTrace] | None] = [None] * len(going)
    while going:
        still: list[_Going] = []
        asks: list[list[ScoredTrace]] = []
        for one, answer in zip(going, answers, strict=True):
            i, name, group, run = one
            try:
                # A generator's first value can only be asked for with None.
                asks.append(run.send(answer))  # type: ignore[arg-type]
                still.append(one)
            except StopIteration:
                yield i, name, group
        flat = [(asked[o[0]], p) for o, ask in zip(still, asks, strict=True) for p in ask]
        whole = iter(source.sample(flat))
        answers = [[next(whole) for _ in ask] for ask in asks]
        going = still


def chosen(options: argparse.Namespace) -> list[Question]:
    """Different questions of a split with so many operations."""
    found: dict[str, Question] = {}
    stream = question_stream(options.split, options.seed, options.operations, 16)
    while len(found) < options.questions:
        question = next(stream)
        found.setdefault(question.question, question)
    return list(found.values())


def report(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """A line per method: beside STEP, paired by question, with 95 % bootstrap intervals."""
    values: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        for key in ("right", "passes", "attended", "tokens", "pruned", "finished", "branches"):
            values[str(row["method"])][key][str(row["question"])].append(float(row[key]))  # type: ignore[arg-type]
    yield (
        "|  | method | right, % | right - STEP, points | p | passes | passes / STEP | "
        "attended / STEP | tokens | pruned | finished | branches |"
    )
    yield "|---" * 12 + "|"
    for name, found in values.items():
        cells = [""] * 4
        if name != "step":
            right, passes, reads = (
                compare(found[key], values["step"][key]) for key in ("right", "passes", "attended")
            )
            assert right is not None and passes is not None and reads is not None
            d = right.difference
            cells = [
                f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]",
                f"{right.p_value:.3f}", f"{passes.ratio.value:.2f}", f"{reads.ratio.value:.2f}",
            ]  # fmt: skip
        mean = {key: mean_of(v).value for key, v in found.items()}
        yield (
            f"| simulated | {name} | {100 * mean['right']:.1f} | {cells[0]} | {cells[1]} | "
            f"{mean['passes']:.0f} | {cells[2]} | {cells[3]} | {mean['tokens']:.0f} | "
            f"{mean['pruned']:.1f} | {mean['finished']:.1f} | {mean['branches']:.1f} |"
        )


def whole_questions(
    file: Path, settings: Mapping[str, object], methods: int
) -> list[dict[str, Any]]:
    """The rows that are there; a question that a kill left without some methods is removed."""
    rows = resumed(file, settings)
    have = Counter((row["question"], row["repeat"]) for row in rows)
    whole = [row for row in rows if have[row["question"], row["repeat"]] == methods]
    if len(whole) < len(rows):
        rewrite(file, settings, whole)
    return whole


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("-n", type=int, default=16, help="traces of a question")
    parser.add_argument("--pool", type=int, help="KV tokens; default: a quarter of n traces")
    parser.add_argument("--split", default="test")
    parser.add_argument("--operations", type=int, default=8, help="at least, up to 16")
    parser.add_argument("--model", choices=[NAME, NAME_DWELLING], default=NAME)
    parser.add_argument("--seed", type=int, default=18, help="of questions and sampling")
    parser.add_argument(
        "--refilled", nargs="+", choices=[*REFILLED, *VARIANTS], default=list(REFILLED)
    )
    parser.add_argument("--together", type=int, default=16, help="questions at a time")
    parser.add_argument("--report", action="store_true", help="only show what --out has")
    options = parser.parse_args()
    if options.report:
        shown = reported(options.out)
        print(f"simulated: {len({row['question'] for row in shown})} questions")
        print("\n".join(report(shown)))
        return
    profile = profile_of(options.model)
    mean = profile.mean_tokens or 0
    pool = options.pool or round(options.n / 4 * mean + profile.prompt_tokens)
    known_rules = {**REFILLED, **VARIANTS}
    refilled = {name: known_rules[name] for name in options.refilled}
    asked = chosen(options)
    names = ("n", "split", "operations", "model", "seed", "refilled", "together")
    settings = {"pool": pool, **{name: getattr(options, name) for name in names}}
    rows = whole_questions(options.out, settings, len(CONTROLS) + 2 * len(refilled))
    done = {(row["question"], row["repeat"]) for row in rows}
    jobs = [
        (repeat, asked[first : first + options.together])
        for repeat in range(options.repeats)
        for first in range(0, len(asked), options.together)
    ]
    with options.out.open("a") as out:
        for number, (repeat, all_of_it) in enumerate(jobs):
            part = [question for question in all_of_it if (question.question, repeat) not in done]
            if not part:
                continue
            source = TraceSource(options.model, 1000 * options.seed + 100 * options.n + number)
            for question, found in results(part, repeat, options.n, pool, source, refilled):
                key = {"question": question.question, "repeat": repeat}
                new = [{**key, "method": name, **asdict(one)} for name, one in found.items()]
                out.write("".join(json.dumps(row) + "\n" for row in new))
                rows += new
            out.flush()
            print(f"{number + 1} of {len(jobs)} batches", flush=True)
    names_asked = {question.question for question in asked}
    rows = [r for r in rows if r["question"] in names_asked and r["repeat"] < options.repeats]
    print(
        f"simulated: {len({r['question'] for r in rows})} questions, n = {options.n}, a pool of "
        f"{pool} tokens"
    )
    print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
