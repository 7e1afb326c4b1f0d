"""Packages that lie in folders of their own, where no other test finds them, and processes that do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where `make` installs them.
BUILD = ROOT / "build"


def run_with(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a module of Python in a process that finds the packages in a folder."""
    paths = os.pathsep.join((str(ROOT), str(folder)))
    # Without what tells a process that it is a worker of pytest's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment | {"PYTHONPATH": paths}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
