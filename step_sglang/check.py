"""``python -m step_sglang.check``: does an SGLang fit? Exit status 1 if not.

Without options the installed one. ``--wheel FILE`` and ``--version X`` look at one that is not
installed, by the syntax of its files: a new release is judged in seconds, on any machine. ``-v``
also says why each target is hooked, and what would make the hook needless.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from step_sglang.errors import ConfigError, StepError

if TYPE_CHECKING:
    from step_sglang.patches.contract import Finding
    from step_sglang.patches.engine_check import Difference


def main(argv: Sequence[str] | None = None) -> int:
    """Print what of SGLang is not as it was tested, and of the installed one also what is.

    Args:
        argv: options; None = the command line's.

    Returns:
        The exit status: 1 where something differs or there is nothing to look at.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="the reason for each hook")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--wheel", type=Path, metavar="FILE", help="a wheel of SGLang, or a folder that holds it"
    )
    other.add_argument("--version", metavar="X", help="a release, which pip downloads")
    args = parser.parse_args(argv)
    try:
        if args.wheel is not None:
            return _check_wheel(args.wheel)
        if args.version is not None:
            with tempfile.TemporaryDirectory() as folder:
                return _check_wheel(_download(args.version, Path(folder)))
    except StepError as error:
        print(f"step-sglang: {error}", file=sys.stderr)
        return 1
    return _check_installed(verbose=args.verbose)


def _check_installed(*, verbose: bool) -> int:
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


def _check_wheel(path: Path) -> int:
    from step_sglang.patches.contract import inspect_targets
    from step_sglang.patches.engine_check import differences
    from step_sglang.patches.reader import MissingError
    from step_sglang.patches.unpacked import Unpacked

    try:
        reader = Unpacked(path)
    except (MissingError, OSError) as error:
        raise ConfigError(str(error)) from error
    findings = inspect_targets(reader=reader)
    wrong = [finding for finding in findings if finding.found is not None]
    others = differences(reader)
    print(f"SGLang {reader.version()}, by its files:")
    _print_table(wrong, others)
    stops = bool(wrong) or any(difference.fatal for difference in others)
    print(f"{len(findings) - len(wrong)} targets match, {len(wrong)} do not")
    if stops:
        print("STEP refuses to start on it")
    elif others:
        print("STEP starts on it only where its operator says so: what changed is to be read")
    else:
        print("as tested")
    return 1 if wrong or others else 0


def _print_table(wrong: Sequence[Finding], others: Sequence[Difference]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "expected", "found", box=box.SIMPLE_HEAD)
    for finding in wrong:
        kind = "absent" if str(finding.found).startswith("missing") else "changed"
        parameters = finding.target.parameters
        expected = "" if parameters is None else f"({', '.join(parameters)})"
        table.add_row(kind, finding.target.path, expected, finding.found)
    for difference in others:
        kind = "absent" if difference.fatal else "changed"
        table.add_row(kind, difference.what, difference.expected, difference.found)
    if table.rows:
        # Paths must stay whole, also in a pipe or a narrow window.
        for column in table.columns[1:]:
            column.overflow = "fold"
        console = Console()
        console.print(table) if console.is_terminal else Console(width=160).print(table)


def _download(version: str, folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:")
    command = [*pip, "--dest", str(folder), f"sglang=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("sglang-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ConfigError(
            f"pip cannot download sglang=={version}: {lines[-1] if lines else done.stderr.strip()}"
        )
    return wheels[0]


if __name__ == "__main__":
    sys.exit(main())
