"""Remembers on what a folder's results were measured, for its report."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from step_sglang import __version__

MACHINE = "machine.jsonl"  # a line for every machine and version that measured


def describe_machine(url: str | None = None) -> dict[str, Any]:
    """Processor, cores that may be used, GPUs, versions, and the commit of a source checkout.

    ``url`` is a server that was there before: it may run elsewhere.
    """
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "url": url,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "package": __version__,
        "commit": _commit(),
        "sglang": _version("sglang"),
        "torch": torch.__version__,
    }


def remember_machine(folder: Path, url: str | None = None) -> None:
    """Add this machine to the folder, unless its last line says the same."""
    file = folder / MACHINE
    line = json.dumps(describe_machine(url))
    known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if line not in known:
        with file.open("a", encoding="utf-8") as sink:
            sink.write(line + "\n")


def machines_of(folders: Sequence[Path]) -> list[str]:
    """Every machine that measured, in words, each once; none where an earlier version measured."""
    found: dict[str, None] = {}
    for folder in folders:
        file = folder / MACHINE
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                found[_in_words(json.loads(line))] = None
            except (ValueError, KeyError, TypeError):
                continue
    return list(found)


def _in_words(machine: Mapping[str, Any]) -> str:
    device = ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['processor']}"
    commit = f" ({machine['commit']})" if machine["commit"] else ""
    where = f"the server {machine['url']}, asked from " if machine.get("url") else ""
    return (
        f"{where}{device}; step-sglang {machine['package']}{commit}, sglang {machine['sglang']}, "
        f"torch {machine['torch']}"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of a source checkout, with a mark where files were changed; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
