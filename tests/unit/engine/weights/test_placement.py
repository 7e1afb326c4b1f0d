"""Where the pristine weights live follows from what is asked for and what is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import nn

from serve_app.engine.base.manifest import bytes_of_layers
from serve_app.engine.weights.placement import (
    CONTEXT_BYTES,
    WeightPlacement,
    bytes_within_share,
    choose_placement,
    fence_share,
    free_bytes_of,
)

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


@pytest.mark.parametrize(
    ("asked", "free", "kept"),
    [("auto", TWICE + 3 * TWINS, 2), ("auto", TWICE + 2 * TWINS - 1, 1), ("auto", ONCE, 0), ("host", 10 * TWICE, 0),
     ("device", 0, 0), ("auto", None, 2)],
)  # fmt: skip
def test_what_is_left_keeps_further_sets_within_their_budget(asked: Asked, free: int | None, kept: int) -> None:
    chosen = choose_placement(
        asked, "auto", layer_bytes=TWINS, reserved_bytes=CACHE, free_bytes=free, cache_bytes=2 * TWINS + 1
    )
    assert chosen.kept_sets == kept
    assert chosen.fused_sets == kept + max(chosen.buffer_sets, 1)


def test_a_cpu_has_no_memory_of_its_own_to_run_short_of() -> None:
    assert free_bytes_of(torch.device("cpu")) is None


def test_only_layers_that_adapters_may_change_are_counted() -> None:
    module = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Conv2d(2, 3, 1, bias=False), nn.Embedding(5, 5))
    assert bytes_of_layers({"unet": module, "text_encoder": nn.Sequential(nn.Linear(3, 3, bias=False))}) == 4 * (
        8 + 2 + 4 + 6 + 9
    )


GIB, GB = 2**30, 10**9
# What a card has in all; what CUDA's own context takes of it is not torch's to give.
CARDS = {"A10G": int(22.5 * GIB), "L4": 22 * GIB, "A100": int(79.2 * GIB), "H100": int(79.2 * GIB)}
CONTEXT = GB // 2
# From published parameter counts at 2 bytes: the base, the layers that adapters may change, a pass as the bases of
# cluster/serve_config.gpu.yaml are drawn (an allowance: not measured on a device).
BASES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (int(2.2 * GB), int(1.9 * GB), int(1.5 * GB)),
    "stabilityai/stable-diffusion-xl-base-1.0": (int(6.9 * GB), int(6.6 * GB), 4 * GB),
    "black-forest-labs/FLUX.1-dev": (int(33.7 * GB), 24 * GB, 6 * GB),
}
SD15, SDXL, FLUX = BASES
CONFIG: Any = yaml.safe_load(Path("cluster/serve_config.gpu.yaml").read_text())
_, *DEPLOYED = CONFIG["applications"]
REPLICAS = {one["args"]["base"]["id"]: one["args"]["base"]["replica"] for one in DEPLOYED}


def placed(card: str, base_id: str) -> tuple[WeightPlacement, int]:
    """Return what a replica of the configuration chooses on a card, and what is left with everything in its place."""
    weights, layers, pass_bytes = BASES[base_id]
    replica = REPLICAS[base_id]
    cache = int(str(replica["device_cache"]).removesuffix("GiB")) * GIB
    total = CARDS[card]
    room = bytes_within_share(total, total - CONTEXT - weights, weights, replica["num_gpus"])
    chosen = choose_placement("auto", "auto", layer_bytes=layers, reserved_bytes=cache + pass_bytes, free_bytes=room)
    return chosen, room - cache - pass_bytes - chosen.buffer_sets * layers


@pytest.mark.parametrize(
    ("card", "base_id", "expected"),
    [
        ("A10G", SD15, DEVICE_AHEAD),
        ("L4", SD15, DEVICE_AHEAD),
        ("A100", SD15, DEVICE_AHEAD),
        ("H100", SD15, DEVICE_AHEAD),
        ("A10G", SDXL, DEVICE),
        ("L4", SDXL, DEVICE),
        ("A100", SDXL, DEVICE_AHEAD),
        ("H100", SDXL, DEVICE_AHEAD),
        ("A100", FLUX, DEVICE),
        ("H100", FLUX, DEVICE),
    ],
)
def test_the_configuration_for_gpus_leaves_room_for_a_pass(card: str, base_id: str, expected: WeightPlacement) -> None:
    chosen, left = placed(card, base_id)
    assert chosen == expected
    assert left >= 0


@pytest.mark.parametrize("card", ["A10G", "L4"])
def test_flux_does_not_fit_a_small_card_at_all(card: str) -> None:
    assert BASES[FLUX][0] > CARDS[card]


def test_a_replica_of_half_a_gpu_leaves_the_other_half_though_it_is_free_yet() -> None:
    total = 100 * GIB
    half = 50 * GIB - CONTEXT_BYTES
    assert bytes_within_share(total, free_bytes=90 * GIB, used_bytes=10 * GIB, gpu_fraction=0.5) == half - 10 * GIB
    assert bytes_within_share(total, free_bytes=30 * GIB, used_bytes=10 * GIB, gpu_fraction=0.5) == 30 * GIB
    assert bytes_within_share(total, free_bytes=90 * GIB, used_bytes=10 * GIB, gpu_fraction=2.0) == 90 * GIB
    assert 2 * (half + CONTEXT_BYTES) <= total


@pytest.mark.parametrize(("fraction", "fenced"), [(0.5, [0.5 - CONTEXT_BYTES / (20 * GIB)]), (1.0, []), (0.0, [])])
def test_a_replica_of_a_part_of_a_gpu_is_fenced_to_it(fraction: float, fenced: list[float]) -> None:
    set_to: list[float] = []
    for device in ("cuda", "cpu"):
        fence_share(torch.device(device), fraction, total_bytes=lambda: 20 * GIB, set_fraction=set_to.append)
    assert set_to == pytest.approx(fenced)
