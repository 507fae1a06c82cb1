"""Writes the corpora: what fuzzing starts from, and of what it found the shortest for each outcome.

`python -m tests.fuzz.seeds scorer=FOLDER request=FOLDER`, the folders as libFuzzer left them.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import torch

from step_sglang import protocol
from tests.fuzz.targets import TARGETS, keep

EACH = 4


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
        protocol.GROUP: "q1", protocol.TRACE: "t1", protocol.WEIGHT: 2, protocol.MIN_SURVIVORS: 3,
        protocol.STEP_SCORES: True, protocol.HIDDEN_STATES: True, protocol.PROMPT_TOKENS: 4,
        protocol.TRACES: 8, protocol.VOTE: "best", protocol.EARLY: "posterior",
        protocol.THRESHOLD: 0.1, protocol.EXTRACT: "number",
    }  # fmt: skip
    steps = [{name: member} for name, member in members.items()] + [dict(members), True, False]
    bodies = [{"custom_params": {protocol.REQUEST_KEY: step}, "n": 1} for step in steps]
    return {f"json-{i}": b"\1" + json.dumps(body).encode() for i, body in enumerate(bodies)}


def main() -> None:
    """Join the seeds with the files of each folder given."""
    found = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for name, seeds in (("scorer", scorer_seeds()), ("request", request_seeds())):
        files = Path(found[name]).iterdir() if name in found else ()
        shortest: dict[str, list[bytes]] = {}
        for content in sorted((file.read_bytes() for file in files), key=len):
            kept = shortest.setdefault(TARGETS[name](content), [])
            if len(kept) < EACH:
                kept.append(content)
        inputs = [*seeds.values(), *(content for kept in shortest.values() for content in kept)]
        keep(name, inputs)
        print(f"{name}: {len(inputs)} inputs, {sum(map(len, inputs))} bytes")


if __name__ == "__main__":
    main()
