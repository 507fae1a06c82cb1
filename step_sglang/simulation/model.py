"""The model that plays traces, as a folder that the engine loads like any other.

Its weights are the traces: for every output token the token, and what the scorer shall make of the
pass that consumes it. A hidden state holds the score's log-odds in its first component and its
negative in the second, which a scorer of two live units turns into the score itself; the others
hold the next token's code, plus and minus ones, which the head's row of that token matches best.

An answer is one token, whatever its length: answers are compared as text, and how many tokens they
take is part of the recorded length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from step_sglang.scoring.calibration import calibration_of
from step_sglang.scoring.scorer import HIDDEN_UNITS, Scorer, ScorerInfo, save_scorer
from step_sglang.simulation.errors import SimulationError
from step_sglang.simulation.played import TAIL, PlayedGroup, PlayedTrace

ARCHITECTURE = "TracePlayer"
HIDDEN = 32
CODE_BITS = HIDDEN - 2
# Names of the weights.
TOKENS, LOG_ODDS, TRACES, QUESTIONS, HEAD = "tokens", "log_odds", "traces", "questions", "head"
SCORER_FILE, CLOCK_FILE, SPEED_FILE = "scorer.safetensors", "clock", "speed.json"

END, THINK_END, BOUNDARY, FILLER = range(4)
_TEXTS = ("<|end|>", "</think>", "\n\n", ".")
_DIGIT = len(_TEXTS)  # the token of the digit 0
_FIRST_ANSWER = _DIGIT + 10
_DIGITS = 4  # of a trace's or a question's number
_CERTAIN = 20.0  # no other token comes within twice that: it is sampled at any usual temperature
_FURTHEST = 15.0  # log-odds: nearer to 0 and 1 fp32 does not tell scores apart


@dataclass(frozen=True)
class Player:
    """The folder of a model that plays traces, and the prompt of each of its groups."""

    folder: Path
    prompts: tuple[tuple[int, ...], ...]

    @property
    def scorer(self) -> Path:
        """Its scorer's file."""
        return self.folder / SCORER_FILE


def write_player(folder: Path, groups: Sequence[PlayedGroup], context: int) -> Player:
    """Write model, tokenizer and scorer.

    Args:
        folder: is made; files of an earlier model are replaced.
        groups: what it plays.
        context: tokens that a request may have, prompt included.

    Raises:
        SimulationError: more questions or traces than it can number, or scores of several
            calibrations.
    """
    calibrations = {group.calibration for group in groups}
    if len(calibrations) > 1:
        raise SimulationError(
            "the groups were scored by scorers of different calibrations, and a server has one: "
            "simulate each folder on its own, or take --scheduler model"
        )
    if max(len(groups), *(len(group.traces) for group in groups)) > 10**_DIGITS:
        raise SimulationError(f"a simulation takes at most {10**_DIGITS} groups, and traces each")
    folder.mkdir(parents=True, exist_ok=True)
    answers = list(
        dict.fromkeys(t.answer for g in groups for t in g.traces if t.answer is not None)
    )
    token_of = {answer: _FIRST_ANSWER + number for number, answer in enumerate(answers)}
    _write_tokenizer(folder, answers)
    vocabulary = (_FIRST_ANSWER + len(answers) + 63) // 64 * 64
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",  # a shape that everybody knows, for the KV pool: nothing attends
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 1,
        "max_position_embeddings": context,
        "eos_token_id": END,
        "bos_token_id": None,
        "pad_token_id": END,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_weights(groups, token_of, vocabulary), folder / "model.safetensors")
    save_scorer(_scorer(calibrations.pop()), folder / SCORER_FILE)
    return Player(folder, tuple(_prompt(i, group) for i, group in enumerate(groups)))


def _write_tokenizer(folder: Path, answers: Sequence[str]) -> None:
    texts = [*_TEXTS, *map(str, range(10))]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(_TEXTS[END], special=True, normalized=False)])
    shown = [_TEXTS[THINK_END], *(f"\\boxed{{{answer}}}" for answer in answers)]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in shown])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_TEXTS[END], pad_token=_TEXTS[END],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip


def _weights(
    groups: Sequence[PlayedGroup], token_of: dict[str, int], vocabulary: int
) -> dict[str, torch.Tensor]:
    tokens, odds = [], []
    for group in groups:
        for number, trace in enumerate(group.traces):
            tokens.append(_tokens(trace, number, token_of))
            odds.append(_log_odds(trace))
    starts = np.cumsum([0, *map(len, tokens)])
    firsts = np.cumsum([0, *(len(group.traces) for group in groups)])
    head = torch.zeros(vocabulary, HIDDEN)
    head[:, 2:] = _CERTAIN * codes(torch.arange(vocabulary))
    return {
        TOKENS: torch.from_numpy(np.concatenate(tokens)),  # [all tokens] int32
        LOG_ODDS: torch.from_numpy(np.concatenate(odds)),  # [all tokens] fp32
        TRACES: torch.from_numpy(starts),  # [traces + 1] int64, where each begins
        QUESTIONS: torch.from_numpy(firsts),  # [groups + 1] int64, first trace of each
        HEAD: head,  # [V, HIDDEN] fp32
    }


def codes(tokens: torch.Tensor) -> torch.Tensor:
    """[N] token ids -> [N, CODE_BITS] of plus and minus ones, different for each."""
    bits = (tokens.long()[:, None] >> torch.arange(CODE_BITS)) & 1
    return (2 * bits - 1).float()


def _tokens(trace: PlayedTrace, number: int, token_of: dict[str, int]) -> np.ndarray:
    found = np.full(trace.tokens, FILLER, np.int32)
    found[trace.positions] = BOUNDARY
    # Its number first: traces that say the same would share their KV through the radix cache.
    free = np.flatnonzero(found[:-TAIL] == FILLER)[:_DIGITS]
    found[free] = [_DIGIT + int(digit) for digit in f"{number:0{_DIGITS}}"[: len(free)]]
    if trace.ends:
        answer = FILLER if trace.answer is None else token_of[trace.answer]
        found[-TAIL:] = [THINK_END, answer, END][-trace.tokens :]
    return found


def _log_odds(trace: PlayedTrace) -> np.ndarray:
    found = np.zeros(trace.tokens, np.float32)
    scores = trace.scores.astype(np.float64)
    with np.errstate(divide="ignore"):
        odds = np.log(scores) - np.log1p(-scores)
    found[trace.positions] = np.clip(odds, -_FURTHEST, _FURTHEST)
    return found


def _scorer(calibration: tuple[float, float] | None) -> Scorer:
    w1, w2 = torch.zeros(HIDDEN_UNITS, HIDDEN), torch.zeros(HIDDEN_UNITS)
    w1[0, 0] = w1[1, 1] = 1.0  # relu(x) - relu(-x) = x
    w2[0], w2[1] = 1.0, -1.0
    info = ScorerInfo(
        "plays traces", (_TEXTS[BOUNDARY],), _TEXTS[THINK_END],
        calibration=calibration_of(calibration),
    )  # fmt: skip
    return Scorer(w1, torch.zeros(HIDDEN_UNITS), w2, torch.zeros(1), info)


def _prompt(number: int, group: PlayedGroup) -> tuple[int, ...]:
    digits = [_DIGIT + int(digit) for digit in reversed(f"{number:0{_DIGITS}}")]
    return tuple((digits + [FILLER] * group.prompt_tokens)[: max(_DIGITS, group.prompt_tokens)])
