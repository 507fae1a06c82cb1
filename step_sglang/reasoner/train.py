"""Trains the embedded reasoner from scratch: `python -m step_sglang.reasoner.train --out DIR`.

Writes a folder that transformers and SGLang load as Qwen3ForCausalLM. Only questions of the
"train" split are used. Deterministic for a given seed and number of threads; the shipped weights
come from the defaults, those of the dwelling reasoner from `--dwelling`, which goes on from them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from step_sglang.reasoner import model_path
from step_sglang.reasoner.network import Reasoner, Shape, load
from step_sglang.reasoner.optimizer import Muon
from step_sglang.reasoner.task import (
    BOUNDARY,
    DWELLING,
    Habits,
    question_stream,
    write_trace,
)
from step_sglang.reasoner.tokenizer import ASSISTANT, EOS, build_tokenizer, prompt_text

STEPS = 2400
DWELLING_STEPS = 300
DWELLING_RATE = 0.25  # of the learning rates
BATCH_TOKENS = 2560
SHORT_SHARE = 0.15  # share of the steps spent on short chains
MATRIX_LR = 0.02
OTHER_LR = 4e-3
WARMUP_STEPS = 30
POOL = 512  # traces sorted by length together, so that a batch pads little
DECISION_WEIGHT = 10.0  # loss weight of heeded choices to re-check, and of the verdicts
WHIM_WEIGHT = 0.3  # and of choices made at random
IGNORED = -100


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--dwelling", action="store_true", help="the reasoner that dwells")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    if args.dwelling:
        model = train_dwelling(tokenizer, args.steps or DWELLING_STEPS, args.seed)
        save(model, tokenizer, args.out, torch.bfloat16)  # half the size
    else:
        save(train(tokenizer, args.steps or STEPS, args.seed), tokenizer, args.out)
    print(f"wrote {args.out}")


def train(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Reasoner:
    """Train from scratch: short chains first, then the full range of lengths."""
    torch.manual_seed(seed + 1)
    model = Reasoner(Shape(vocab_size=len(tokenizer)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    short = int(steps * SHORT_SHARE)
    stages = (
        (short, batches(tokenizer, seed, 1, 6, Habits())),
        (steps - short, batches(tokenizer, seed + 1, 4, 16, Habits())),
    )
    descend(model, stages, 1.0)
    return model


def train_dwelling(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Reasoner:
    """Go on from the shipped weights with a writer whose wrong traces are long."""
    model = load(model_path())
    descend(model, ((steps, batches(tokenizer, seed + 2, 4, 16, DWELLING)),), DWELLING_RATE)
    return model


def descend(
    model: Reasoner, stages: Sequence[tuple[int, Iterator[tuple[Tensor, Tensor]]]], scale: float
) -> None:
    """Train on so many batches of each stage; ``scale`` is of the learning rates."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.0)
    steps = sum(count for count, _ in stages)
    step, tokens, started = 0, 0, time.monotonic()
    for count, stream in stages:
        for _ in range(count):
            ids, weights = next(stream)
            loss, plain = weighted_loss(model, ids, weights)
            model.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            rate = scale * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
            for group in adam.param_groups:
                group["lr"] = OTHER_LR * rate
            adam.step()
            muon.step(MATRIX_LR * rate)
            step += 1
            tokens += ids.numel()
            if step % 50 == 0 or step == steps:
                elapsed = time.monotonic() - started
                print(
                    f"step {step}/{steps} loss {plain:.4f} {tokens / elapsed:,.0f} tokens/s "
                    f"{elapsed / 60:.1f} min, {elapsed / 60 * (steps / step - 1):.1f} left",
                    flush=True,
                )


def batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    min_operations: int,
    max_operations: int,
    habits: Habits,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [B, T], loss weights [B, T] of each token as a target)."""
    rng = random.Random(f"writer/{seed}")
    stream = question_stream("train", seed, min_operations, max_operations)
    while True:
        texts, heeded = [], []
        for _ in range(POOL):
            question = next(stream)
            trace = write_trace(question, rng, habits)
            texts.append(prompt_text(question.question) + trace.text + EOS)
            heeded.append(trace.heeded)
        encoded = zip(tokenizer(texts)["input_ids"], heeded, strict=True)
        rows = sorted(encoded, key=lambda row: len(row[0]))
        pool = []
        while rows:
            count = max(1, BATCH_TOKENS // len(rows[-1][0]))
            chunk, rows = rows[-count:], rows[:-count]
            pool.append(collate(tokenizer, chunk))
        rng.shuffle(pool)
        yield from pool


def collate(
    tokenizer: PreTrainedTokenizerFast, rows: list[tuple[list[int], list[bool]]]
) -> tuple[Tensor, Tensor]:
    """Pad rows of ids, and weight each token as a target: 0 in the prompt and the padding."""
    ids = torch.full((len(rows), max(len(row) for row, _ in rows)), tokenizer.eos_token_id)
    weights = torch.zeros(ids.shape)
    boundary, ok, no, reply = tokenizer.convert_tokens_to_ids([BOUNDARY, "ok", "no", ASSISTANT])
    for i, (row, heeded) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, row.index(reply) + 2 : len(row)] = 1.0  # what follows the prompt
        choices = (ids[i] == boundary).nonzero()[:, 0] + 1
        choices = choices[choices < len(row)]
        weights[i, choices] = torch.where(
            torch.tensor(heeded, dtype=torch.bool), DECISION_WEIGHT, WHIM_WEIGHT
        )
    weights[(ids == ok) | (ids == no)] *= DECISION_WEIGHT
    return ids, weights


def weighted_loss(model: Reasoner, ids: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """The loss to minimise, and the plain mean over the reply's tokens."""
    targets = ids[:, 1:].masked_fill(weights[:, 1:] == 0, IGNORED).flatten()
    chosen = targets != IGNORED
    hidden = model(ids[:, :-1]).flatten(0, 1)[chosen]
    losses = F.cross_entropy(model.logits(hidden), targets[chosen], reduction="none")
    chosen_weights = weights[:, 1:].flatten()[chosen]
    loss = (losses * chosen_weights).sum() / chosen_weights.sum()
    return loss, float(losses.detach().mean())


def save(
    model: Reasoner,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the folder in the layout of transformers; ``dtype`` is that of the weights on disk."""
    out.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # written readable by its owner alone
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    generation = {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
