"""Folders that look like a CUDA toolkit of some version."""

from __future__ import annotations

from pathlib import Path

ARCHS_13 = "75 80 86 87 88 89 90 100 110 103 120 121"


def make_toolkit(home: Path, version: str = "13.0", archs: str = ARCHS_13) -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    listed = "\n".join(f"compute_{arch}" for arch in archs.split())
    (home / "bin/nvcc").write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo "Cuda compilation tools, release {version}, '
        f'V{version}.1" ;;\n--list-gpu-arch) echo "{listed}" ;;\n*) exit 1 ;;\nesac\n'
    )
    (home / "bin/nvcc").chmod(0o755)
    return home
