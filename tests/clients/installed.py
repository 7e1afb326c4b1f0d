"""Clients of other people, installed where they meet none of this project's own packages: in folders under `build/`.

A folder is made once for each list in `packages/`; where it cannot be made, its tests skip and say so.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

PACKAGES = Path(__file__).with_name("packages")
INSTALLED = Path(__file__).parents[2] / "build" / "clients"
LIMIT_S = 300


def python_packages(name: str) -> Path:
    """Return a folder with the Python packages of `packages/<name>.txt`, which need no others than those there and
    ours."""
    requirements = PACKAGES / f"{name}.txt"
    # Of thousands of files few are ever imported: none is compiled before that.
    quickly = ["-q", "--no-deps", "--no-compile"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *quickly, "-r"]
    return _installed(requirements, [*pip, str(requirements), "--target", "."])


def node_packages() -> Path:
    """Return a folder with the `node_modules` of `packages/package.json`."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node here: its clients were not tried")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    return _installed(PACKAGES / "package.json", command)


def _installed(packages: Path, command: Sequence[str]) -> Path:
    digest = hashlib.sha256(packages.read_bytes()).hexdigest()[:12]
    folder = INSTALLED / f"{packages.stem}-{digest}"
    if folder.is_dir():
        return folder
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=INSTALLED) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        shutil.copy(packages, made)
        if subprocess.run(command, cwd=made, capture_output=True, timeout=LIMIT_S, check=False).returncode:
            pytest.skip(f"the clients of {packages.name} could not be installed: they were not tried")
        made.rename(folder)
    return folder
