"""Writes the inputs that fuzzing starts from: `python -m tests.fuzz.seeds`."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import torch

from step_sglang import words
from tests.fuzz.targets import CORPUS


def pickled(value: object) -> bytes:
    """A torch file's own pickle, for four storages of the sizes of a scorer of width 8."""
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return bytes([3, 0, 4, 3, 2, 2, 1, 0, 0]) + archive.read(name)


def scorer_seeds() -> dict[str, bytes]:
    """Good and bad scorer files in the form that the target reads."""
    state = {
        "net.0.weight": torch.zeros(512, 8),
        "net.0.bias": torch.zeros(512),
        "net.2.weight": torch.zeros(1, 512),
        "net.2.bias": torch.zeros(1),
    }
    sparse = {**state, "net.0.weight": torch.zeros(512, 8).to_sparse()}
    meta = {**state, "net.0.bias": torch.zeros(512, device="meta")}
    return {
        "good-safetensors": bytes([2, 0, 1]),
        "wrong-dtype": bytes([2, 1, 0, 1, 1, 1]),
        "wrong-shape": bytes([2, 1, 0, 2, 2, 8, 8, 1]),
        "torch": pickled(state),
        "torch-wrapped": pickled({"model_state_dict": state}),
        "torch-sparse": pickled(sparse),
        "torch-meta": pickled(meta),
        "pickled-code": bytes([3, 0, 0, 0, 0, 0]) + pickle.dumps(print, 2),
        "raw-pickle": bytes([1]) + pickle.dumps({"net.0.weight": 1}, 2),
        "header": bytes([0]) + (40).to_bytes(8, "little") + b'{"w1":{"dtype":"F32","shape":[1]}}',
    }


def request_seeds() -> dict[str, bytes]:
    """One request for every member, as JSON."""
    members = {
        words.GROUP: "q1", words.TRACE: "t1", words.WEIGHT: 2, words.MIN_SURVIVORS: 3,
        words.STEP_SCORES: True, words.HIDDEN_STATES: True, words.PROMPT_TOKENS: 4,
        words.TRACES: 8, words.VOTE: "best", words.EARLY: "posterior", words.THRESHOLD: 0.1,
        words.EXTRACT: "number",
    }  # fmt: skip
    steps = [{name: member} for name, member in members.items()] + [dict(members), True, False]
    bodies = [{"custom_params": {words.REQUEST_KEY: step}, "n": 1} for step in steps]
    return {f"json-{i}": b"\1" + json.dumps(body).encode() for i, body in enumerate(bodies)}


if __name__ == "__main__":
    for name, seeds in (("scorer", scorer_seeds()), ("request", request_seeds())):
        CORPUS[name].mkdir(parents=True, exist_ok=True)
        for file, content in seeds.items():
            (CORPUS[name] / file).write_bytes(content)
        print(name, len(seeds), sum(map(len, seeds.values())), "bytes")
