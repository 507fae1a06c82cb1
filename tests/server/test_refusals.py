"""What must be refused at start-up, with a message that says what is wrong and what is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step_sglang.client.launch import free_port
from step_sglang.gathering.folder import prepare
from tests.hub import running_hub
from tests.models import build_scorer
from tests.server.launch import LAUNCH_SERVER, SGLANG_SERVE, arguments, run_to_end

pytestmark = pytest.mark.server

# Drives SGLang's own start-up up to the moment before it launches processes, once per case: a
# process for each would spend most of its time on imports.
PROBE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from step_sglang.patches import preflight

for name, argv in json.load(open(sys.argv[1])).items():
    try:
        preflight.launch_subprocesses(object, prepare_server_args(argv))
        said = "started"
    except SystemExit as end:
        said = end.code
    print("CASE", json.dumps([name, said]))
"""

CHANGED_SGLANG = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.managers.scheduler import Scheduler
del Scheduler.get_prefill_adder_class
original = Scheduler.update_running_batch
Scheduler.update_running_batch = lambda self, batch, more: original(self, batch)
from sglang.srt.server_args import prepare_server_args
from step_sglang import check
assert check.main([]) == 1
prepare_server_args(sys.argv[1:])
"""


def test_refusals(models: dict[str, Path], scorer: Path, tmp_path: Path) -> None:
    tensors = load_file(scorer)
    metadata = {"format": "step-sglang-scorer", "version": "1"}
    nan = tmp_path / "nan.safetensors"
    save_file({**tensors, "b1": torch.full((512,), torch.nan)}, nan, metadata)
    shape = tmp_path / "shape.safetensors"
    save_file({**tensors, "w1": torch.ones(64, 512)}, shape, metadata)
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"not a scorer at all")
    wide = build_scorer(tmp_path / "wide.safetensors", hidden=128)

    prepare(theirs := tmp_path / "theirs", "another")

    base = ["--model-path", str(models["qwen3"]), "--device", "cpu", "--dtype", "float32"]
    step = [*base, "--enable-step", "--step-scorer"]
    good = [*step, str(scorer)]
    cases = {
        "good": good,
        "speculative": [*good, "--speculative-algorithm", "DFLASH"],
        "pipeline": [*good, "--pp-size", "2"],
        "disaggregation": [*good, "--disaggregation-mode", "prefill"],
        "embedding": [*good, "--is-embedding"],
        "dllm": [*good, "--dllm-algorithm", "LowConfidence"],
        "drafts with dp attention": [
            *(*good, "--speculative-algorithm", "EAGLE", "--tp-size", "2", "--attn-dp-size", "2"),
        ],
        "distributed weights": [*good, "--dwdp-size", "2"],
        "ray": [*good, "--use-ray"],
        "keys of tokenizer workers": [*good, "--tokenizer-worker-num", "2", "--api-key", "k"],
        "host cache of drafts": [
            *(*good, "--enable-hierarchical-cache", "--speculative-algorithm", "NGRAM"),
        ],
        "storage": [*good, "--enable-hierarchical-cache", "--hicache-storage-backend", "file"],
        "write back": [
            *(*good, "--enable-hierarchical-cache", "--hicache-write-policy", "write_back"),
        ],
        "deterministic": [*good, "--enable-deterministic-inference"],
        "refill": [*good, "--step-refill", "best", "--strip-thinking-cache"],
        "stripped without refill": [*good, "--strip-thinking-cache"],
        "megakernel": [*good, "--enable-nvidia-megakernel"],
        "lmcache": [*good, "--enable-lmcache"],
        "flexkv": [*good, "--enable-flexkv"],
        "no scorer": step[:-1],
        "missing": [*step, str(tmp_path / "missing")],
        "unreadable": [*step, str(noise)],
        "shape": [*step, str(shape)],
        "nan": [*step, str(nan)],
        "hidden size": [*step, str(wide)],
        "delimiter": [*good, "--step-delimiter", "§§§§"],
        "survivors": [*good, "--step-min-survivors", "0"],
        "contradiction": [*good, "--step-policy", "paper", "--step-scope", "thinking"],
        "policy": [*good, "--step-policy", "papper"],
        "kept groups": [*good, "--step-sample", str(tmp_path / "kept")],
        "kept groups of another": [*good, "--step-sample", str(theirs)],
        "no folder for groups": [*good, "--step-sample", str(noise)],
        "share": [*good, "--step-sample", str(tmp_path / "kept"), "--step-sample-share", "1.5"],
        "share alone": [*good, "--step-sample-share", "0.5"],
        "kept by the paper's policy": [
            *(*good, "--step-policy", "paper", "--step-sample", str(tmp_path / "kept")),
        ],
        "hub": [*step, "org/fits"],
        "hub width": [*step, "org/wide"],
        "hub two": [*step, "org/two"],
        "hub name": [*step, "org/missing"],
        "auto": [*step, "auto"],
        "not enabled": [*base, "--step-scorer", str(scorer)],
    }
    expected = {
        "good": "started",
        "speculative": "speculative decoding by DFLASH",
        "pipeline": "pipeline parallelism",
        "disaggregation": "prefill/decode disaggregation",
        "embedding": "embedding models",
        "dllm": "diffusion language models",
        "drafts with dp attention": "speculative decoding with data-parallel attention",
        "distributed weights": "data parallelism with distributed weights",
        "ray": "Ray (--use-ray)",
        "keys of tokenizer workers": "API keys with several tokenizer workers",
        "host cache of drafts": "(--enable-hierarchical-cache) with speculative decoding",
        "write back": "(--enable-hierarchical-cache) with --hicache-write-policy write_back",
        "storage": "(--enable-hierarchical-cache) with a storage behind the host's memory",
        "deterministic": "which trace is pruned depends on what else runs",
        "refill": "not supported with --step-refill best: --strip-thinking-cache",
        "stripped without refill": "started",
        "megakernel": "the megakernel (--enable-nvidia-megakernel): it replaces the forward pass",
        "lmcache": "LMCache (--enable-lmcache)",
        "flexkv": "FlexKV (--enable-flexkv)",
        "no scorer": "--enable-step needs --step-scorer PATH",
        "missing": "does not exist",
        "unreadable": "not a readable safetensors file",
        "shape": "w1 has shape [64, 512]; it must be [512, d]",
        "nan": "b1 holds NaN or infinity",
        "hidden size": "size 128, but",
        "delimiter": "no token of this tokenizer contains the step delimiter '§§§§'",
        "survivors": "--step-min-survivors must be an integer of at least 1, not 0",
        "contradiction": "--step-scope thinking contradicts it",
        "policy": "--step-policy must be one of fair, paper, not 'papper' (did you mean 'paper'?)",
        "kept groups": "started",
        "kept groups of another": "holds groups of another, and this server serves",
        "no folder for groups": "cannot write there",
        "share": "--step-sample-share must be a share of the groups, above 0 and at most 1",
        "share alone": "--step-sample-share needs --step-sample DIR",
        "kept by the paper's policy": "so --step-sample contradicts it",
        "hub": "started",
        "hub width": "size 128, but",
        "hub two": "org/two holds 2 scorers",
        "hub name": "the Hub has no repository org/missing",
        "auto": "no scorer is known for",
        "not enabled": "without --enable-step",
    }
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    with running_hub() as hub:
        hub.add("org/fits", scorer__safetensors=scorer.read_bytes())
        hub.add("org/wide", scorer__safetensors=wide.read_bytes())
        hub.add("org/two", a_scorer__pt=b"", b_scorer__pt=b"")
        at_hub = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        _, output = run_to_end(
            (str(tmp_path / "probe.py"),), tmp_path / "cases.json", log=tmp_path / "log", **at_hub
        )
    said = dict(json.loads(line[5:]) for line in output.splitlines() if line.startswith("CASE "))
    assert said.keys() == expected.keys(), output
    for name, words in expected.items():
        assert words in said[name], (name, said[name])
        assert words == "started" or said[name].startswith("step-sglang: ")


@pytest.mark.parametrize(
    "entry", [LAUNCH_SERVER, pytest.param(SGLANG_SERVE, marks=pytest.mark.full)]
)
def test_a_refused_server_exits_non_zero_with_the_message_last(
    models: dict[str, Path], entry: tuple[str, ...], tmp_path: Path
) -> None:
    flags = ("--model-path", str(models["qwen3"]), "--enable-step", "--step-scorer")
    argv = arguments(free_port(), *flags, str(tmp_path / "none"))
    status, said = run_to_end(entry, *argv, log=tmp_path / "log")
    assert status == 1
    assert f"step-sglang: scorer {tmp_path / 'none'} does not exist" in said.splitlines()
    assert "Traceback" not in said


def test_another_sglang_is_refused(models: dict[str, Path], scorer: Path, tmp_path: Path) -> None:
    script = tmp_path / "changed.py"
    script.write_text(CHANGED_SGLANG)
    flags = ("--model-path", str(models["qwen3"]), "--enable-step", "--step-scorer", str(scorer))
    status, said = run_to_end((str(script),), *flags, log=tmp_path / "log")
    assert status == 1
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    assert f"{scheduler}.get_prefill_adder_class" in said and "missing" in said
    assert f"{scheduler}.update_running_batch" in said
    assert "expected: (self, batch)" in said
    assert "found:    (self, batch, more)" in said
    assert "targets match, 2 do not" in said


@pytest.mark.full
def test_a_diffusion_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0"}'
    )
    flags = ("--model-path", str(tmp_path), "--enable-step", "--step-scorer", "s")
    argv = arguments(free_port(), *flags)
    status, said = run_to_end(SGLANG_SERVE, *argv, log=tmp_path / "log")
    assert status == 1
    assert "is a diffusion pipeline" in said
