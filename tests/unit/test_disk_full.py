"""A store on a disk that is really full: a file system of one mebibyte, in a mount namespace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
PROGRAM = """
import json, subprocess, sys
from pathlib import Path
import numpy as np
from step_sglang.training.errors import StoreError
from step_sglang.training.reader import Reader
from step_sglang.training.store import Writer
from tests.training_samples import meta, question

disk = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
store, rng = Path(disk) / "store", np.random.default_rng(1)
added, message = [], ""
with Writer(store, meta(n=3)) as writer:
    for i in range(100_000):
        try:
            writer.add(question(f"q{i}", rng, n=3, steps=(5, 20)))
        except StoreError as error:
            message = str(error)
            break
        added.append(f"q{i}")
kept = sorted({r.question_id for s in Reader(store).stream() for r in s.traces})
subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
with Writer(store, meta(n=3)) as writer:
    repairs, done = writer.repairs, sorted(writer.done)
    writer.add(question("last", rng, n=3, steps=(5, 20)))
last = "last" in {r.question_id for s in Reader(store).stream() for r in s.traces}
print(json.dumps([sorted(added), message, kept, repairs, done, last]))
"""


def namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = "mount -t tmpfs -o size=1m tmpfs /tmp && mount -o remount,size=4m /tmp"
    done = subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not namespaces(), reason="needs a user namespace that may mount")
def test_a_full_disk_keeps_what_was_collected(tmp_path: Path) -> None:
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    added, message, kept, repairs, again, last = json.loads(done.stdout)
    print(f"{len(added)} questions before the disk was full")
    assert len(added) >= 10
    assert f"the disk is full: the {len(added)} questions" in message
    assert "free some space and run the same command again" in message
    assert kept == added == again and last
    assert all("which no complete question uses" in repair for repair in repairs)
