"""Requests for captured traces, and how their answers are read. Sends nothing.

    request   sampling_params.custom_params = {"step": {"hidden_states": true, "step_scores": true}}
    answer    meta_info["step"]["hidden_states"] = {"dtype", "shape": [S, d], "data": base64}
              meta_info["step"]["positions"] = [output token index of each row's boundary token]

With ``prompt_tokens: P`` in the request, tokens from P on of the *input* count as the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from step_sglang import protocol
from step_sglang.client.sampling import Sampling
from step_sglang.errors import ServerError
from step_sglang.scoring.capture import decode


@dataclass(frozen=True, eq=False)
class CapturedTrace:
    """One trace as the server returned it. T output tokens, S boundaries."""

    text: str
    tokens: tuple[int, ...]  # [T]
    finish: str
    logprobs: tuple[float, ...]  # [T] natural
    confidences: tuple[float, ...]  # [T] minus the mean log-probability of the top k; NaN if k = 0
    positions: NDArray[np.int64]  # [S]
    hidden: torch.Tensor  # [S, d]


def generate_body(
    prompt: Sequence[int], n: int, sampling: Sampling, top_logprobs: int
) -> dict[str, Any]:
    """POST /generate: n sampled traces of one prompt."""
    step = {protocol.HIDDEN_STATES: True, protocol.STEP_SCORES: True}
    return {
        "input_ids": list(prompt),
        "sampling_params": {
            **asdict(sampling),
            "n": n,
            "custom_params": {protocol.REQUEST_KEY: step},
        },
        "return_logprob": True,
        "top_logprobs_num": top_logprobs,
    }


def prefill_body(prompt: Sequence[int], output: Sequence[int], top_logprobs: int) -> dict[str, Any]:
    """POST /generate: prefill an existing trace; the one token it samples is ignored."""
    step = {protocol.HIDDEN_STATES: True, protocol.PROMPT_TOKENS: len(prompt)}
    return {
        "input_ids": [*prompt, *output],
        "sampling_params": {
            "max_new_tokens": 1,
            "temperature": 0.0,
            "custom_params": {protocol.REQUEST_KEY: step},
        },
        "return_logprob": True,
        # The first entry has no log-probability: start one token early.
        "logprob_start_len": len(prompt) - 1,
        "top_logprobs_num": top_logprobs,
    }


def read_generated(answer: Any, n: int, top_logprobs: int) -> list[CapturedTrace]:
    """The n traces of an answer to :func:`generate_body`.

    Raises:
        ServerError: the answer lacks something, or a trace was aborted.
    """
    parts = answer if isinstance(answer, list) else [answer]
    if len(parts) != n:
        raise ServerError(f"the server returned {len(parts)} traces instead of {n}")
    captures = []
    for part in parts:
        with _Unusable("a generated trace"):
            info = part["meta_info"]
            tokens = [int(token) for token in part["output_ids"]]
            finish = info["finish_reason"]
            if finish["type"] == "abort":
                raise ServerError(
                    f"the server ended a trace early: {finish.get('message', 'aborted')}"
                )
            captures.append(
                _capture(
                    part["text"],
                    tokens,
                    finish["type"],
                    info["output_token_logprobs"],
                    info.get("output_top_logprobs") if top_logprobs else None,
                    info,
                )
            )
    return captures


def read_prefilled(
    answer: Any, text: str, output: Sequence[int], top_logprobs: int, finish: str = "stop"
) -> CapturedTrace:
    """The trace of an answer to :func:`prefill_body`; ``finish`` is how it had ended.

    Raises:
        ServerError: the answer lacks something.
    """
    with _Unusable("a prefilled trace"):
        part = answer[0] if isinstance(answer, list) else answer
        info = part["meta_info"]
        logprobs = info["input_token_logprobs"]
        tops = info.get("input_top_logprobs") if top_logprobs else None
        return _capture(
            text,
            list(output),
            finish,
            logprobs[len(logprobs) - len(output) :],
            tops[len(tops) - len(output) :] if tops else None,
            info,
        )


class _Unusable:
    """Turns a missing or malformed member into one clear error."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KeyError, TypeError, IndexError, ValueError)) and not isinstance(
            error, ServerError
        ):
            raise ServerError(
                f"the server's answer for {self._what} is unusable: "
                f"{type(error).__name__} {error}; is it an SGLang server of this version?"
            ) from error


def _capture(
    text: str,
    tokens: list[int],
    finish: str,
    logprobs: Sequence[Sequence[Any]],
    tops: Sequence[Sequence[Sequence[Any]]] | None,
    info: Mapping[str, Any],
) -> CapturedTrace:
    if [entry[1] for entry in logprobs] != tokens:
        raise ServerError("the server's log-probabilities belong to other tokens than its output")
    if tops is not None and len(tops) != len(tokens):
        raise ServerError(f"the server returned {len(tops)} top lists for {len(tokens)} tokens")
    step = info.get(protocol.META_KEY)
    wanted = {protocol.META_HIDDEN_STATES, protocol.META_POSITIONS}
    if not isinstance(step, Mapping) or not wanted <= set(step):
        raise ServerError(
            "the server returns no hidden states: start it with --enable-step --step-capture"
        )
    hidden = _tensor(step[protocol.META_HIDDEN_STATES])
    positions = np.asarray(step[protocol.META_POSITIONS], np.int64).reshape(-1)
    if len(positions) != len(hidden):
        raise ServerError(
            f"the server returned {len(hidden)} hidden states for {len(positions)} boundaries"
        )
    return CapturedTrace(
        text=text,
        tokens=tuple(tokens),
        finish=finish,
        logprobs=tuple(float(entry[0]) for entry in logprobs),
        confidences=tuple(
            [-float(np.mean([entry[0] for entry in top])) for top in tops]
            if tops is not None
            else [float("nan")] * len(tokens)
        ),
        positions=positions,
        hidden=hidden,
    )


def _tensor(value: dict[str, Any]) -> torch.Tensor:
    try:
        hidden = decode(value)
    except ValueError as error:
        raise ServerError(f"the server's hidden states are unusable: {error}") from error
    if not hidden.is_floating_point() or hidden.dim() != 2:
        raise ServerError(f"hidden states of dtype {hidden.dtype}, shape {list(hidden.shape)}")
    return hidden
