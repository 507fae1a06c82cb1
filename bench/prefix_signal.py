"""Does the score of a prefix tell how its continuations will do? On the embedded reasoner.

    python bench/prefix_signal.py --questions 80 --out FILE

Samples 16 traces of a question, cuts each at the step boundary after 25, 50 and 75 % of its steps,
and continues every prefix 8 times. Printed are, for each depth, the correlation of the running mean
of the step scores up to the boundary with the share of right continuations, within the question,
and how the continuations of the best-scored prefix do beside those of all prefixes and beside new
traces. The model runs in torch, on one thread: nothing is pruned and nothing timed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from step_sglang.reasoner import Question, model_path, questions, scorer_path
from step_sglang.reasoner.network import Reasoner, Shape, rope_table, rotate
from step_sglang.reasoner.task import BOUNDARY, THINK_END, is_correct
from step_sglang.reasoner.tokenizer import EOS, build_tokenizer, prompt_text
from step_sglang.scoring.reference import step_logits
from step_sglang.scoring.scorer import load_scorer

DEPTHS = (0.25, 0.5, 0.75)  # of a trace's steps
MAX_NEW = 900  # tokens
_GROW = 64  # positions by which a cache grows


@dataclass
class Trace:
    """A sampled trace: its tokens, and position and score of each of its steps."""

    tokens: list[int]
    positions: list[int]
    scores: list[float]
    thinking: bool = True
    ended: bool = False


class Model:
    """The reasoner with a cache of keys and values."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.net = Reasoner(Shape(vocab_size=len(self.tokenizer)))
        weights = load_file(model_path() / "model.safetensors")
        self.net.load_state_dict(
            {name.removeprefix("model."): w.float() for name, w in weights.items()}, strict=False
        )
        self.cos, self.sin = rope_table(2048, self.net.shape)
        self.scorer = load_scorer(scorer_path())
        (self.boundary,) = self.tokenizer.encode(BOUNDARY, add_special_tokens=False)
        (self.think_end,) = self.tokenizer.encode(THINK_END, add_special_tokens=False)
        self.eos = self.tokenizer.convert_tokens_to_ids(EOS)

    @torch.inference_mode()
    def continue_all(self, prompt: list[int], traces: list[Trace]) -> None:
        """Sample every trace to its end; what it has is taken as it is."""
        rows = list(range(len(traces)))
        cache = _Cache(self.net.shape, len(rows))
        sequences = [[*prompt, *traces[row].tokens] for row in rows]
        # Together, left to right: a row that is longer than others just starts to sample later.
        place = 0
        while rows:
            ids = torch.tensor([sequences[row][place] for row in rows])
            hidden = self._step(ids, place, cache)
            place += 1
            scores = torch.sigmoid(
                step_logits(hidden, self.scorer.w1, self.scorer.b1, self.scorer.w2, self.scorer.b2)
            )
            sampled = torch.multinomial(F.softmax(self.net.logits(hidden), -1), 1)[:, 0].tolist()
            kept = []
            for number, row in enumerate(rows):
                trace, consumed = traces[row], place - 1 - len(prompt)
                token = sequences[row][place - 1]
                if consumed >= 0 and consumed >= len(trace.tokens) - 1:
                    if token == self.think_end:
                        trace.thinking = False
                    elif token == self.boundary and trace.thinking:
                        trace.positions.append(consumed)
                        trace.scores.append(float(scores[number]))
                if place == len(sequences[row]):
                    token = sampled[number]
                    trace.ended = token == self.eos or len(trace.tokens) >= MAX_NEW
                    if not trace.ended:
                        trace.tokens.append(token)
                        sequences[row].append(token)
                if not trace.ended:
                    kept.append(number)
            if len(kept) < len(rows):
                rows = [rows[number] for number in kept]
                cache.keep(kept)

    def _step(self, ids: Tensor, place: int, cache: _Cache) -> Tensor:
        """Final-norm hidden states [B, d] of one more token of every row."""
        cos, sin = self.cos[place : place + 1], self.sin[place : place + 1]
        x = self.net.embed_tokens(ids)[:, None]
        for number, layer in enumerate(self.net.layers):
            a, h = layer.self_attn, layer.input_layernorm(x)

            def heads(y: Tensor) -> Tensor:
                return y.view(*y.shape[:-1], -1, self.net.shape.head_dim)

            q = rotate(a.q_norm(heads(a.q_proj(h))), cos, sin).transpose(1, 2)
            k = rotate(a.k_norm(heads(a.k_proj(h))), cos, sin).transpose(1, 2)
            keys, values = cache.add(number, place, k, heads(a.v_proj(h)).transpose(1, 2))
            y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            x = x + a.o_proj(y.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.net.norm(x)[:, 0]

    def right(self, question: Question, trace: Trace) -> bool:
        """Whether it ends in the right answer."""
        return is_correct(question, self.tokenizer.decode(trace.tokens))


class _Cache:
    """Keys and values [layers, B, heads, T, D] of rows that are all equally long."""

    def __init__(self, shape: Shape, rows: int) -> None:
        size = (shape.num_hidden_layers, rows, shape.num_key_value_heads, _GROW, shape.head_dim)
        self._kv = [torch.zeros(size), torch.zeros(size)]

    def add(self, layer: int, place: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if place == self._kv[0].shape[3]:
            self._kv = [F.pad(t, (0, 0, 0, _GROW)) for t in self._kv]
        for tensor, new in zip(self._kv, (k, v), strict=True):
            tensor[layer, :, :, place] = new[:, :, 0]
        return self._kv[0][layer][:, :, : place + 1], self._kv[1][layer][:, :, : place + 1]

    def keep(self, rows: list[int]) -> None:
        self._kv = [t[:, rows] for t in self._kv]


@dataclass(frozen=True)
class Prefix:
    """A prefix and how it did."""

    score: float
    share: float  # of right continuations
    ended_right: bool  # the trace that it is of
    tokens: int


def prefixes_of(
    model: Model, question: Question, traces: int, continuations: int
) -> dict[str, object]:
    """Sample a question's traces, and the continuations of their prefixes."""
    prompt = model.tokenizer.encode(prompt_text(question.question), add_special_tokens=False)
    first = [Trace([], [], []) for _ in range(traces)]
    model.continue_all(prompt, first)
    right = [model.right(question, trace) for trace in first]
    found: dict[float, list[Prefix]] = {}
    for depth in DEPTHS:
        cut: list[tuple[Trace, int, bool]] = []
        for trace, good in zip(first, right, strict=True):
            steps = max(1, round(depth * len(trace.scores)))
            if trace.scores:
                cut.append((trace, steps, good))
        children = [
            [
                Trace(trace.tokens[: trace.positions[steps - 1] + 1], [], [])
                for _ in range(continuations)
            ]
            for trace, steps, _ in cut
        ]
        model.continue_all(prompt, [child for family in children for child in family])
        found[depth] = [
            Prefix(
                float(np.mean(trace.scores[:steps])),
                float(np.mean([model.right(question, child) for child in family])),
                good,
                trace.positions[steps - 1] + 1,
            )
            for (trace, steps, good), family in zip(cut, children, strict=True)
        ]
    return {
        "question": question.question,
        "right": right,
        "prefixes": {str(d): [vars(p) for p in found[d]] for d in DEPTHS},
    }


def correlation(groups: list[list[dict[str, float]]]) -> float:
    """Pearson's, of score and share, each less its question's mean."""
    x = np.concatenate([_centred([p["score"] for p in g]) for g in groups])
    y = np.concatenate([_centred([p["share"] for p in g]) for g in groups])
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / norm) if norm else 0.0


def _centred(values: list[float]) -> np.ndarray:
    return np.asarray(values) - np.mean(values)


def report(rows: list[dict[str, object]]) -> str:
    """The figures by depth, with 95 % bootstrap intervals over questions."""
    lines = []
    draws = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    new = np.array([np.mean(row["right"]) for row in rows])  # type: ignore[arg-type]
    for depth in DEPTHS:
        groups = [row["prefixes"][str(depth)] for row in rows]  # type: ignore[index]
        best = np.array([max(g, key=lambda p: p["score"])["share"] for g in groups])
        every = np.array([np.mean([p["share"] for p in g]) for g in groups])

        def shown(values: np.ndarray) -> str:
            low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
            return f"{100 * values.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"

        several = [correlation([groups[i] for i in draw]) for draw in draws[:500]]
        low, high = np.percentile(several, (2.5, 97.5))
        lines.append(
            f"| {100 * depth:.0f} % | {correlation(groups):.3f} [{low:.3f}, {high:.3f}] | "
            f"{100 * new.mean():.1f} | {100 * every.mean():.1f} | {100 * best.mean():.1f} | "
            f"{shown(best - every)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--traces", type=int, default=16)
    parser.add_argument("--continuations", type=int, default=8)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=7, help="of the questions, and of the sampling")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a question")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = Model()
    rows = []
    with args.out.open("w") as out:
        for question in questions(args.split, args.questions, args.seed):
            rows.append(prefixes_of(model, question, args.traces, args.continuations))
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
    print("| depth | correlation | new traces | all prefixes | best prefix | best - all |")
    print(report(rows))


if __name__ == "__main__":
    main()
