"""``python -m tests.soak --minutes 30``: hours of users in minutes, on a pool that is too small.

Prints the figures and exits with 1 if a request was lost or doubled, a token or slot leaked, or
the memory of a process grows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.models import build_model, build_scorer
from tests.soak.run import soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="without STEP, to compare with")
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    parser.add_argument("flags", nargs="*", help="further server flags, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        report = soak(
            build_model(root / "model"),
            None if args.stock else build_scorer(root / "scorer.safetensors"),
            args.log or root / "soak.log",
            minutes=args.minutes,
            seed=args.seed,
            flags=tuple(args.flags),
        )
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
