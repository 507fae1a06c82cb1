"""``python -m tests.mix --setting pages --seed 7``: a hostile mix of actions on one server.

The same setting, seed and number of actions repeat the same sequence of actions. Prints what came
back, and exits with 1 if anything was wrong; then it prints the actions too.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.mix.plan import SETTINGS
from tests.mix.run import flags, mix
from tests.models import build_model, build_scorer
from tests.server.launch import serve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--actions", type=int, default=120, help="of each seed")
    parser.add_argument("--minutes", type=float, default=0, help="further seeds for each setting")
    parser.add_argument("--log", type=Path, help="folder of the servers' logs")
    args = parser.parse_args()
    # A run that is told to end must still stop its servers.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = [build_model(root / f"model{seed}", seed=seed) for seed in (0, 7)]
        scorer = build_scorer(root / "scorer.safetensors")
        for name in args.setting or SETTINGS:
            setting = SETTINGS[name]
            log = (args.log or root) / f"{name}-{args.seed}.log"
            with serve(models[0], *flags(setting, scorer), log=log) as server:
                until = time.monotonic() + args.minutes * 60
                seed = args.seed
                while True:
                    outcome = mix(server, models, name, setting, seed, args.actions)
                    print(outcome, flush=True)
                    failed += bool(outcome.problems)
                    seed += 1
                    if time.monotonic() > until or server.process.poll() is not None:
                        break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
