"""Samples the embedded reasoner's traces into stores without a server, many questions at once.

    python bench/reasoner_store.py OUT --split scorer-train --questions 400 -n 32 [--model DIR]

The same store as `step-sglang collect reasoner:SPLIT` writes, several times faster: one batch holds
the traces of many questions, in fp32 and with the network that the reasoner is trained with. Beside
the store, OUT/tokens keeps four statistics of every output token, for signals without a scorer:
its log-probability, that of the most likely token, DeepConf's confidence and the entropy. A run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from step_sglang.data.questions import Job, question_id
from step_sglang.reasoner import model_path
from step_sglang.reasoner.network import Attention, Reasoner, load, rope_table, rotate
from step_sglang.reasoner.task import questions
from step_sglang.training.collect import CollectSettings, assemble
from step_sglang.training.prompts import load_prompter
from step_sglang.training.setup import REASONER_SAMPLING
from step_sglang.training.store import Writer
from step_sglang.training.stored import StoreMeta
from step_sglang.training.wire import CapturedTrace

TOP_K = 20  # candidates of a token confidence
STATISTICS = ("logprob", "most likely", "confidence", "entropy")
_COMPACT_BELOW = 0.85  # share of rows that still grow at which the others are dropped


@dataclass
class Sampled:
    """One trace while it grows."""

    tokens: list[int] = field(default_factory=list)
    statistics: list[np.ndarray] = field(default_factory=list)  # [4] each, of every token
    positions: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    finish: str = "length"


class Decoder:
    """The network with a KV cache: rows of one prompt length, which all grow together."""

    def __init__(self, model: Reasoner, rows: int, capacity: int) -> None:
        shape = model.shape
        self.model = model
        self.cos, self.sin = rope_table(capacity, shape)
        size = (rows, shape.num_key_value_heads, capacity, shape.head_dim)
        self.keys = [torch.zeros(size) for _ in model.layers]
        self.values = [torch.zeros(size) for _ in model.layers]
        self.starts = torch.zeros(rows, dtype=torch.int64)  # first place that a row uses
        self.length = 0

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.starts = self.starts[rows]

    def forward(self, ids: Tensor) -> Tensor:
        """Final-norm hidden states [B, T, d] of the next ids [B, T] of every row."""
        start, end = self.length, self.length + ids.shape[1]
        places = torch.arange(start, end)
        positions = (places[None] - self.starts[:, None]).clamp(min=0)  # [B, T]
        cos, sin = self.cos[positions], self.sin[positions]  # [B, T, 1, D]
        seen = torch.arange(end)[None, None] >= self.starts[:, None, None]
        mask = seen & (torch.arange(end)[None, None] <= places[None, :, None])  # [B, T, end]
        mask[:, :, 0] |= ~mask.any(-1)  # a padding row attends to something
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            x = x + self._attend(i, layer.self_attn, layer.input_layernorm(x), cos, sin, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.length = end
        return self.model.norm(x)

    def _attend(
        self, i: int, block: Attention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        batch, count, _ = x.shape
        start, end = self.length, self.length + count

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, count, -1, block.head_dim)

        q = rotate(block.q_norm(heads(block.q_proj(x))), cos, sin)  # [B, T, H, D]
        k = rotate(block.k_norm(heads(block.k_proj(x))), cos, sin)
        self.keys[i][:, :, start:end] = k.transpose(1, 2)
        self.values[i][:, :, start:end] = heads(block.v_proj(x)).transpose(1, 2)
        keys, values = self.keys[i][:, :, :end], self.values[i][:, :, :end]
        kv_heads = keys.shape[1]
        # Query heads of one KV head follow each other: [B, G, (H/G) T, D].
        q = q.view(batch, count, kv_heads, -1, block.head_dim).permute(0, 2, 3, 1, 4)
        shared = q.shape[2]
        q = q.reshape(batch, kv_heads, shared * count, block.head_dim)
        weights = q @ keys.transpose(-1, -2) * block.head_dim**-0.5
        weights = weights.masked_fill(~mask.repeat(1, shared, 1)[:, None], float("-inf"))
        y = weights.softmax(-1) @ values
        y = y.view(batch, kv_heads, shared, count, block.head_dim).permute(0, 3, 1, 2, 4)
        return block.o_proj(y.reshape(batch, count, -1))


@torch.inference_mode()
def sample(
    model: Reasoner,
    prompts: Sequence[Sequence[int]],
    boundaries: frozenset[int],
    eos: int,
    limit: int,
    generator: torch.Generator,
) -> list[Sampled]:
    """One trace of every prompt at temperature 1."""
    longest = max(map(len, prompts))
    found = [Sampled() for _ in prompts]
    decoder = Decoder(model, len(prompts), longest + limit)
    ids = torch.full((len(prompts), longest), eos)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        decoder.starts[row] = longest - len(prompt)
    ends_step = torch.zeros(model.shape.vocab_size, dtype=torch.bool)
    ends_step[list(boundaries)] = True
    hidden = decoder.forward(ids)[:, -1]
    owners = list(range(len(prompts)))
    alive = torch.ones(len(prompts), dtype=torch.bool)
    for number in range(limit):
        logits = model.logits(hidden)
        logprobs = logits.log_softmax(-1)
        probs = logprobs.exp()
        tokens = torch.multinomial(probs, 1, generator=generator)[:, 0]
        statistics = torch.stack(
            [
                logprobs.gather(1, tokens[:, None])[:, 0],
                logprobs.amax(-1),
                -logprobs.topk(TOP_K, dim=-1).values.mean(-1),
                -(probs * logprobs).sum(-1),
            ],
            dim=1,
        ).numpy()
        for row in alive.nonzero()[:, 0].tolist():
            trace, token = found[owners[row]], int(tokens[row])
            trace.tokens.append(token)
            trace.statistics.append(statistics[row])
            if token == eos:
                trace.finish = "stop"
                alive[row] = False
        if int(alive.sum()) < _COMPACT_BELOW * len(alive):
            kept = alive.nonzero()[:, 0]
            decoder.keep(kept)
            owners = [owners[row] for row in kept.tolist()]
            tokens, alive = tokens[kept], alive[kept]
        if not owners:
            break
        hidden = decoder.forward(tokens[:, None])[:, 0]
        for row in (ends_step[tokens] & alive).nonzero()[:, 0].tolist():
            found[owners[row]].positions.append(number)
            found[owners[row]].hidden.append(hidden[row].clone())
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="scorer-train")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1, help="of the questions and the traces")
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--name", default="reasoner")
    parser.add_argument("--rows", type=int, default=512, help="traces in one batch")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model).eval()
    prompter = load_prompter(str(options.model), ("\n\n",))
    meta = StoreMeta(
        model=options.name,
        hidden_size=model.shape.hidden_size,
        n=options.n,
        source=f"reasoner:{options.split}, seed {options.seed}",
        sampling=asdict(REASONER_SAMPLING),
        confidence_window=20,
    )
    settings = CollectSettings(REASONER_SAMPLING, keep_text=True)
    asked = questions(options.split, options.questions, options.seed)
    eos = prompter.tokenizer.eos_token_id
    per_batch = max(1, options.rows // options.n)
    started, right, total, tokens = time.monotonic(), 0, 0, 0
    with Writer(options.out, meta) as writer:
        for first in range(0, len(asked), per_batch):
            part = asked[first : first + per_batch]
            if question_id(part[-1].question) in writer.done:
                continue
            generator = torch.Generator().manual_seed(options.seed + first)
            prompts = [prompter.prompt(q.question) for q in part for _ in range(options.n)]
            found = sample(
                model,
                prompts,
                prompter.boundaries,
                eos,
                REASONER_SAMPLING.max_new_tokens,
                generator,
            )
            for i, question in enumerate(part):
                mine = found[i * options.n : (i + 1) * options.n]
                captures = [
                    CapturedTrace(
                        text=prompter.tokenizer.decode(t.tokens[:-1]),
                        tokens=tuple(t.tokens),
                        finish=t.finish,
                        logprobs=tuple(float(s[0]) for s in t.statistics),
                        confidences=tuple(float(s[2]) for s in t.statistics),
                        positions=np.asarray(t.positions, np.int64),
                        hidden=torch.stack(t.hidden)
                        if t.hidden
                        else torch.empty(0, meta.hidden_size),
                    )
                    for t in mine
                ]
                name = question_id(question.question)
                job = Job(name, question.question, question.answer)
                result = assemble(job, captures, prompter, meta, settings)
                writer.add(result)
                right += sum(t.correct for t in result.traces)
                total += len(result.traces)
                tokens += sum(len(trace.tokens) for trace in mine)
                (options.out / "tokens").mkdir(exist_ok=True)
                np.savez_compressed(
                    options.out / "tokens" / f"{name}.npz",
                    **{str(j): np.asarray(t.statistics, np.float16) for j, t in enumerate(mine)},
                )
            seconds = time.monotonic() - started
            print(
                f"{first + len(part)}/{len(asked)} questions, {right / total:.3f} right, "
                f"{tokens / total:.0f} tokens a trace, {tokens / seconds:,.0f} tokens/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
