"""Every way to start: ``sgl.Engine``, ``sglang serve``, a configuration file; and ``--help``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.server.launch import LAUNCH_SERVER, SGLANG_SERVE, run_to_end, serve

pytestmark = pytest.mark.server

ENGINE = """
import json, sys
import sglang as sgl

if __name__ == "__main__":
    model, scorer = sys.argv[1:]
    try:
        sgl.Engine(
            model_path=model, device="cpu", enable_step=True, step_scorer=scorer + ".missing"
        )
    except ValueError as error:
        refused = str(error)
    engine = sgl.Engine(
        model_path=model, device="cpu", dtype="float32", max_total_tokens=2000,
        enable_step=True, step_scorer=scorer, step_min_survivors=5,
    )
    try:
        answers = engine.generate(
            input_ids=list(range(40, 60)),
            sampling_params={"n": 40, "max_new_tokens": 150, "ignore_eos": True},
        )
    finally:
        engine.shutdown()
    steps = [answer["meta_info"]["step"] for answer in answers]
    print("RESULT", json.dumps({"refused": refused, "steps": steps}))
"""


def test_engine(models: dict[str, Path], scorer: Path, tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    status, said = run_to_end((str(script),), models["qwen3"], scorer, log=tmp_path / "log")
    assert status == 0, said
    result = json.loads(said.split("RESULT", 1)[1].splitlines()[0])
    assert "does not exist" in result["refused"]
    assert len({step["group"] for step in result["steps"]}) == 1
    pruned = sum(step["pruned"] for step in result["steps"])
    assert 0 < pruned <= 35


def test_serve_with_a_configuration_file_and_its_end(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(
        "enable-step: true\n"
        f"step-scorer: {scorer}\n"
        "step-policy: paper\n"
        "step-delimiter: ['.\\n\\n', '!']\n"
    )
    flags = ("--max-total-tokens", "2000", "--config", str(config))
    with serve(models["qwen3"], *flags, log=tmp_path / "serve.log", entry=SGLANG_SERVE) as server:
        assert "policy='paper'" in server.log_text()
        assert r"delimiters=('.\n\n', '!')" in server.log_text()
        answers = server.generate(
            text="So", sampling_params={"n": 40, "max_new_tokens": 150, "ignore_eos": True}
        )
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        assert server.process.wait(timeout=60) in (0, -signal.SIGTERM)
        gone, alive = psutil.wait_procs(children, timeout=30)
        assert gone and not alive
    assert any(answer["meta_info"]["step"]["pruned"] for answer in answers)


def test_help_shows_the_flags_in_their_own_group(tmp_path: Path) -> None:
    status, said = run_to_end(LAUNCH_SERVER, "--help", log=tmp_path / "log")
    assert status == 0, said
    section = said.split("\nSTEP:\n", 1)[1]
    for flag in (
        *("--enable-step", "--step-scorer", "--step-policy {fair,paper}", "--step-min-steps"),
        *("--step-scope {thinking,all}", "--step-min-survivors", "--step-delimiter"),
    ):
        assert f"  {flag}" in section
