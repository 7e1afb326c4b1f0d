"""What only a GPU can show, on whatever device is here: exact swaps, two streams, page-locked copies, host placement.

Part of `make gpu`; on a CPU the same lines run with small layers. Needs torch, diffusers and pytest alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from serve_app.bench.measuring.options import Device, Model, SwapOptions
from serve_app.bench.models.denoisers import fill_outline, outline_of
from serve_app.engine.adapters.canonical import read_canonical, write_canonical
from serve_app.engine.adapters.deltas import Coverage, Delta, Dora, LowRank, ParsedAdapter
from serve_app.engine.base.manifest import manifest_of
from serve_app.engine.weights.fuse import fuse_weight
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.integrity import IntegrityChecker
from serve_app.engine.weights.made_up import warm_swaps
from serve_app.engine.weights.placement import WeightPlacement

IS_ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_ON_GPU else "cpu")
UNIT = 16 if IS_ON_GPU else 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """Layers of SDXL's shapes, or of an eighth of them and less on a CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.same = nn.ModuleList(nn.Linear(40 * UNIT, 40 * UNIT) for _ in range(5))
        self.wide = nn.ModuleList(nn.Linear(40 * UNIT, 160 * UNIT, bias=False) for _ in range(3))
        self.text = nn.ModuleList(nn.Linear(128 * UNIT, 40 * UNIT, bias=False) for _ in range(3))
        self.conv = nn.Conv2d(20 * UNIT, 20 * UNIT, 3)
        self.to(DEVICE, dtype)

    def run(self, sample: Tensor) -> Tensor:
        """Use some layers, as a pass does."""
        for layer in self.same:
            sample = layer(sample)
        return sample


def adapter(net: nn.Module, dtype: torch.dtype, seed: int, rank: int, folder: Path) -> ParsedAdapter:
    """Return an adapter over all layers, one of them a DoRA, as it is read from its canonical file."""
    random_values = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random_values) * 0.02).to(dtype)

    changes: dict[str, Delta] = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            changes[name] = LowRank(draw(rank, layer.in_features), draw(layer.out_features, rank), rank / 2, rank)
        elif isinstance(layer, nn.Conv2d):
            down = draw(rank, layer.in_channels, *layer.kernel_size)
            changes[name] = LowRank(down, draw(layer.out_channels, rank, 1, 1), rank, rank)
    first = changes["same.0"]
    assert isinstance(first, LowRank)
    changes["same.0"] = Dora(first, draw(40 * UNIT) + 1)
    path = folder / f"{seed}-{rank}"
    write_canonical(ParsedAdapter(path.name, {"unet": changes}, Coverage(1, 1)), path)
    return read_canonical(path, pinned=IS_ON_GPU)


def one_by_one(pristine: Mapping[str, Tensor], *adapters: tuple[ParsedAdapter, float]) -> dict[str, Tensor]:
    """Fuse layer by layer, by the formulas that equal peft's."""
    weights = {name: tensor.clone() for name, tensor in pristine.items()}
    for one, scale in adapters:
        for _, module, delta in one.layers():
            name = f"{module}.weight"
            base = pristine[name]
            fuse_weight(weights[name], base, weights[name], delta, scale)
    return weights


def differing(net: nn.Module, expected: Mapping[str, Tensor]) -> list[str]:
    """Return which parameters differ in a bit."""
    return [name for name, value in net.named_parameters() if not torch.equal(value, expected[name])]


def loaded(net: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters."""
    return {name: value.detach().clone() for name, value in net.named_parameters()}


@pytest.mark.parametrize("base_weights", ["device", "host"])
@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swaps_have_the_bits_of_layer_by_layer(
    dtype: torch.dtype, rank: int, base_weights: Literal["device", "host"], tmp_path: Path
) -> None:
    net = Net(dtype)
    pristine = loaded(net)
    weights = FusedWeights({"unet": net}, device_cache_bytes=1 << 30, base_weights=base_weights)
    adapters = [adapter(net, dtype, seed, rank, tmp_path) for seed in range(3)]
    for composition in ([(0, 1.0)], [(1, 0.7), (2, -0.3)], [], [(2, 1.0), (0, 0.5), (1, 2.0)]):
        wanted = [(adapters[place], scale) for place, scale in composition]
        weights.apply(wanted)
        assert differing(net, one_by_one(pristine, *wanted)) == []
    weights.apply([])
    assert differing(net, pristine) == []


def test_what_is_prepared_beside_running_passes_is_exact(tmp_path: Path) -> None:
    net = Net(torch.bfloat16)
    pristine, chance = loaded(net), random.Random(0)
    adapters = [adapter(net, torch.bfloat16, seed, 16, tmp_path) for seed in range(3)]
    expected = [one_by_one(pristine, (one, 1.0)) for one in adapters]
    weights = FusedWeights({"unet": net}, device_cache_bytes=2 * adapters[0].size_bytes)
    sample = torch.randn(64, 40 * UNIT, device=DEVICE).bfloat16()
    bound = 0
    weights.apply([(adapters[bound], 1.0)])
    first = net.run(sample)
    for _ in range(50):
        following = chance.randrange(3)
        outcomes = [net.run(sample) for _ in range(20)]  # launched, and still running on a GPU
        prepared = weights.prepare([(adapters[following], 1.0)])
        outcomes += [net.run(sample) for _ in range(5)]
        weights.bind(prepared)
        assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
        assert differing(net, expected[following]) == []
        bound = following
    weights.apply([(adapters[0], 1.0)])
    assert torch.equal(net.run(sample), first)


def test_a_flipped_bit_is_found_where_the_weights_lie() -> None:
    net = Net(torch.bfloat16)
    weights = FusedWeights({"unet": net})
    check = IntegrityChecker(weights.checksummed_tensors, is_modified=weights.is_modified)
    assert check.check_all() is None
    net.wide[1].weight.data.view(torch.int16)[3, 5] ^= 1
    damage = check.check_all()
    assert damage is not None
    assert damage.tensor == "unet.wide.1.weight"


@pytest.mark.parametrize("base_weights", ["device", "host"])
def test_a_made_up_adapter_warms_a_whole_denoiser(base_weights: Literal["device", "host"]) -> None:
    options = SwapOptions(Model.SDXL, Device.CUDA if IS_ON_GPU else Device.CPU, is_narrow=True)
    denoiser = fill_outline(outline_of(options), options)
    weights = FusedWeights({"unet": denoiser.module}, base_weights=base_weights)
    before = weights.checksum()
    warm_swaps(weights, manifest_of(denoiser.pipeline), WeightPlacement(base_weights, base_weights == "device"))
    assert (weights.applied, weights.checksum()) == ((), before)
