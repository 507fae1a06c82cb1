"""``python -m step_sglang.check``: does the installed SGLang fit? Exit status 1 if not.

``-v`` also says why each target is hooked, and what would make the hook needless.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Print every hooked or used target of SGLang and whether it is as it was tested.

    Args:
        argv: options; None = the command line's.

    Returns:
        The exit status, 1 where something differs.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="the reason for each hook")
    verbose = parser.parse_args(argv).verbose
    # Late, because this package itself never imports the engine.
    from step_sglang.patches.contract import inspect_targets
    from step_sglang.patches.engine_check import BODIES, FIELDS, differences

    findings = inspect_targets()
    for finding in findings:
        print(finding.explained() if verbose else finding)
    wrong = sum(finding.found is not None for finding in findings)
    print(f"{len(findings) - wrong} targets match, {wrong} do not")
    others = differences()
    for difference in others:
        print(difference)
    print(
        f"version, fields of {len(FIELDS)} classes and text of {len(BODIES)} functions: "
        + (f"{len(others)} differences" if others else "as tested")
    )
    return 1 if wrong or others else 0


if __name__ == "__main__":
    sys.exit(main())
