"""Lays another SGLang over the environment of this interpreter: ``compat.py 0.5.22 FOLDER``.

Only what that version pins otherwise is installed, without its own dependencies: seconds and some
hundred MB instead of minutes and 11 GB. A package that the index cannot deliver is left out and
named; on a CPU none of those is used.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

version, folder = sys.argv[1], Path(sys.argv[2])
subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
python = folder / "bin" / "python"
site = next(folder.glob("lib/python3*/site-packages"))
# As plain paths, so that what the other environment installs as editable is not there.
below = [path for path in sys.path if path.endswith("site-packages")]
(site / "below.pth").write_text("".join(f"{path}\n" for path in below))


def install(*what: str) -> str:
    """Install without dependencies; pip's words where it could not."""
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps")
    done = subprocess.run([*pip, *what], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


if failed := install("--ignore-installed", f"sglang=={version}"):
    sys.exit(f"SGLang {version} does not install:\n{failed}")
(found,) = metadata.distributions(name="sglang", path=[str(site)])
left_out = []
for line in found.requires or ():
    wanted = Requirement(line)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        continue
    try:
        if wanted.specifier.contains(metadata.version(wanted.name), prereleases=True):
            continue
    except metadata.PackageNotFoundError:
        pass
    if install("--ignore-installed", f"{wanted.name}{wanted.specifier}"):
        left_out.append(wanted.name)
if failed := install("--no-build-isolation", "-e", "."):
    sys.exit(f"this package does not install:\n{failed}")
(folder / ".made").touch()
print(f"SGLang {version} in {folder}; left out: {', '.join(left_out) or 'nothing'}")
