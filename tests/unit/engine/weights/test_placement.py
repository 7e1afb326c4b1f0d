"""Where the pristine weights live follows from what is asked for and what is free."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from serve_app.engine.base.manifest import bytes_of_layers
from serve_app.engine.weights.placement import WeightPlacement, choose_placement, free_bytes_of

TWINS, CACHE = 5_000, 2_000
ONCE, TWICE = TWINS + CACHE, 2 * TWINS + CACHE
DEVICE, DEVICE_AHEAD, HOST = (
    WeightPlacement("device", False),
    WeightPlacement("device", True),
    WeightPlacement("host", False),
)
Asked = Literal["auto", "device", "host"]
SwapPrefetcher = Literal["auto", "always", "never"]


@pytest.mark.parametrize(
    ("asked", "ahead", "free", "expected"),
    [
        ("auto", "auto", TWICE, DEVICE_AHEAD),
        ("auto", "auto", TWICE - 1, DEVICE),
        ("auto", "auto", ONCE, DEVICE),
        ("auto", "auto", ONCE - 1, HOST),
        ("auto", "always", ONCE, DEVICE_AHEAD),
        ("auto", "always", ONCE - 1, HOST),
        ("auto", "never", TWICE, DEVICE),
        ("device", "auto", 0, DEVICE_AHEAD),
        ("device", "never", 0, DEVICE),
        ("host", "always", TWICE, HOST),
        ("auto", "auto", None, DEVICE),
        ("auto", "always", None, DEVICE_AHEAD),
        ("device", "never", None, DEVICE),
        ("host", "always", None, HOST),
    ],
)
def test_the_choice(asked: Asked, ahead: SwapPrefetcher, free: int | None, expected: WeightPlacement) -> None:
    assert choose_placement(asked, ahead, layer_bytes=TWINS, reserved_bytes=CACHE, free_bytes=free) == expected


def test_a_cpu_has_no_memory_of_its_own_to_run_short_of() -> None:
    assert free_bytes_of(torch.device("cpu")) is None


def test_only_layers_that_adapters_may_change_are_counted() -> None:
    module = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Conv2d(2, 3, 1, bias=False), nn.Embedding(5, 5))
    assert bytes_of_layers({"unet": module, "text_encoder": nn.Linear(3, 3, bias=False)}) == 4 * (8 + 2 + 6 + 9)
