"""Torchvision for the families whose processors need it, on machines whose torch has no CUDA too.

The wheel of the registry is compiled for torch with CUDA. Its operators do not load beside another torch, and without
them it cannot be imported, though no processor uses one. So it lies in a folder of its own, where no other test finds
it, and the operators that it names at import are declared before.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from tests.apart import BUILD

FOLDER = BUILD / "vision"
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
