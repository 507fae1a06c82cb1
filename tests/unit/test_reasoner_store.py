"""The sampler of stores without a server computes what the network does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from step_sglang.reasoner import model_path
from step_sglang.reasoner.network import load
from step_sglang.training.reader import Reader

ROOT = Path(__file__).parent.parent.parent


def test_its_states_and_statistics_are_those_of_a_whole_forward_pass(tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = [sys.executable, "bench/reasoner_store.py", out, "-n", "3", "--questions", "2"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    reader = Reader(out, with_text=True)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = load(model_path())
    assert len(reader.shards) == 2
    for shard in reader.stream():
        stored = np.load(out / "tokens" / f"{shard.traces[0].question_id}.npz")
        for trace in shard.traces:
            assert trace.tokens is not None
            message = [{"role": "user", "content": trace.question}]
            prompt = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            ids = torch.tensor([[*prompt, *trace.tokens]])
            with torch.inference_mode():
                hidden = model(ids)
                logprobs = model.logits(hidden)[0].log_softmax(-1)
            rows = torch.from_numpy(trace.steps.positions.astype(np.int64)) + len(prompt)
            found = shard.hidden[trace.first_row : trace.first_row + trace.num_steps].float()
            torch.testing.assert_close(found, hidden[0, rows], atol=0.02, rtol=0.01)
            before = logprobs[len(prompt) - 1 : -1]
            likeliest = before.amax(-1).numpy()
            chosen = before.gather(1, torch.tensor(trace.tokens)[:, None])[:, 0].numpy()
            statistics = stored[str(trace.sample)]
            assert np.abs(statistics[:, 1] - likeliest).max() < 0.01
            assert np.abs(statistics[:, 0] - chosen).max() < 0.02
