"""Torchvision for the families whose processors need it, on machines whose torch has no CUDA too.

The wheel of the registry is compiled for torch with CUDA. Its operators do not load beside another torch, and without
them it cannot be imported, though no processor uses one. So it lies in a folder of its own, where no other test finds
it, and the operators that it names at import are declared before.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
# Where `make` installs it.
FOLDER = ROOT / "build" / "vision"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_DECLARED: list[torch.library.Library] = []


def has_torchvision() -> bool:
    """Say whether torchvision can be imported in this process; declares its operators where it cannot load them."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return False
    if not _DECLARED:
        try:
            torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            for operator in _OPERATORS:
                library.define(operator)
            _DECLARED.append(library)
    return True


def run_with_torchvision(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a module of Python in a process that finds torchvision."""
    paths = os.pathsep.join((str(ROOT), str(FOLDER)))
    # Without what tells a process that it is a worker of pytest's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment | {"PYTHONPATH": paths}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
