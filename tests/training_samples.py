"""Stores with a planted signal, and a fake server that speaks the capture's wire format."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from step_sglang.reasoner import model_path
from step_sglang.training.store import Writer
from step_sglang.training.stored import Steps, StoredQuestion, StoredTrace, StoreMeta
from tests import stand_in

D = 16


def meta(**changed: Any) -> StoreMeta:
    values: dict[str, Any] = {"model": "planted", "hidden_size": D, "n": 8, "source": "test"}
    return StoreMeta(**{**values, **changed})


def question(
    name: str,
    rng: np.random.Generator,
    n: int = 8,
    d: int = D,
    share: float = 0.5,
    signal: float = 1.0,
    difficulty: float = 0.0,
    steps: tuple[int, int] = (3, 9),
) -> StoredQuestion:
    """One question: axis 0 of its states shows correctness, axis 1 the question's difficulty.

    ``share`` of the traces is correct. The log-probability and the confidence carry no signal.
    """
    traces, rows = [], []
    for sample in range(n):
        count = int(rng.integers(*steps)) if steps[1] > steps[0] else steps[0]
        correct = bool(rng.random() < share)
        hidden = rng.standard_normal((count, d))
        hidden[:, 0] += signal * (1 if correct else -1)
        hidden[:, 1] += difficulty
        rows.append(hidden)
        noise = rng.standard_normal((2, count)).astype(np.float32)
        traces.append(
            StoredTrace(
                name, sample, f"what is {name}?", "7", "7" if correct else str(10 + sample % 3),
                correct, 10 * count + 5, "stop", 0, 0,
                Steps(np.arange(9, 10 * count, 10, dtype=np.int32), noise[0], noise[1]),
                float(rng.standard_normal()), float(rng.standard_normal()), f"trace {sample}",
            )
        )  # fmt: skip
    return StoredQuestion(tuple(traces), torch.tensor(np.concatenate(rows)))


def planted_store(folder: Path, questions: int, seed: int = 0, **changed: Any) -> Path:
    """A store of planted questions; ``changed`` goes to :func:`question`."""
    rng = np.random.default_rng(seed)
    store_meta = meta(n=changed.get("n", 8), hidden_size=changed.get("d", D))
    with Writer(folder, store_meta) as writer:
        for number in range(questions):
            writer.add(question(f"s{seed}q{number}", rng, **changed))
    return folder


@dataclass
class FakeServer:
    """What the fake server does, and what it was asked."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    tamper: Callable[[dict[str, Any]], Any] = lambda part: part  # changes one trace's answer
    fail_from: int | None = None  # from this request on, close the connection without an answer
    refuse: str | None = None  # refuse requests whose prompt contains this


class Generator:
    """Deterministic traces of the reasoner's tokenizer; every third one is wrong."""

    def __init__(self, d: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_path())
        self.boundary = self.tokenizer.convert_tokens_to_ids("\n\n")
        self.d = d
        self.count = 0

    def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        params = body["sampling_params"]
        step = params["custom_params"]["step"]
        if "prompt_tokens" in step:
            start = step["prompt_tokens"]
            part = self._part(body["input_ids"][start:], "x", body, "input")
            entries = part["meta_info"]["input_token_logprobs"]
            entries.insert(0, [None, body["input_ids"][start - 1], None])
            assert body["logprob_start_len"] == start - 1
            return [part]
        parts = []
        for _ in range(params["n"]):
            self.count += 1
            steps = 2 + self.count % 4
            answer = 7 if self.count % 3 else 8
            text = "".join(f"A:{i}+1={i + 1}\n\n" for i in range(steps))
            text += f"</think>\\boxed{{{answer}}}\n\nok"
            tokens = [*self.tokenizer.encode(text, add_special_tokens=False), 0]
            parts.append(self._part(tokens, text, body, "output"))
        return parts

    def _part(
        self, tokens: list[int], text: str, body: dict[str, Any], side: str
    ) -> dict[str, Any]:
        positions = [i for i, token in enumerate(tokens) if token == self.boundary]
        rng = np.random.default_rng(len(self.tokenizer.decode(tokens)))
        hidden = rng.standard_normal((len(positions), self.d)).astype(np.float32)
        hidden[:, 0] = positions  # recognisable
        tops = [[[-0.5, t, None], [-1.5, 0, None]] for t in tokens]
        return {
            "text": text,
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "stop"},
                f"{side}_token_logprobs": [
                    [-0.25 * (i % 2), t, None] for i, t in enumerate(tokens)
                ],
                f"{side}_top_logprobs": tops,
                "step": {
                    "positions": positions,
                    "hidden_states": {
                        "dtype": "float32",
                        "shape": list(hidden.shape),
                        "data": base64.b64encode(hidden.tobytes()).decode(),
                    },
                },
            },
        }


@contextmanager
def fake_server(model: str, d: int = 128, revision: str | None = None) -> Iterator[FakeServer]:
    """Serve /model_info, /server_info and /generate on a free port."""
    state, generator, lock = FakeServer(), Generator(d), threading.Lock()

    class Handler(stand_in.Handler):
        def do_GET(self) -> None:
            self.answer({"model_path": model, "revision": revision})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                if state.fail_from is not None and len(state.bodies) >= state.fail_from:
                    self.connection.close()
                    return
                state.bodies.append(body)
                prompt = generator.tokenizer.decode(body["input_ids"])
                if state.refuse is not None and state.refuse in prompt:
                    self.answer({"message": "the prompt is too long"}, 400)
                    return
                self.answer([state.tamper(part) for part in generator.generate(body)])

    with stand_in.serving(Handler) as state.url:
        yield state
