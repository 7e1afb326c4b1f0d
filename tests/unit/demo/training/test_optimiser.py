"""The optimiser, its rate and the averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from serve_app.demo.training.optimiser import Muon, WeightAverage, orthogonal, rate_at


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_an_update_has_nearly_equal_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)

    values = torch.linalg.svdvals(orthogonal(torch.randn(shape) * 5))

    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_the_optimiser_fits_a_linear_map() -> None:
    torch.manual_seed(0)
    inputs, goal = torch.randn(64, 8), torch.randn(8, 4)
    model = nn.Linear(8, 4)
    optimiser = Muon(model.named_parameters(), rate=0.2, small_rate=0.01)

    losses: list[float] = []
    for step in range(100):
        loss = (model(inputs) - inputs @ goal).square().mean()
        losses.append(loss.item())
        optimiser.step(loss, rate_at(step, 100, warm_up=5))

    assert losses[-1] < 0.02 * losses[0]


def test_the_rate_rises_then_falls_to_its_floor() -> None:
    rates = [rate_at(step, 1000) for step in range(1000)]

    assert max(rates) == rates[50] == 1.0
    assert rates[:50] == sorted(rates[:50])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_exchanging_averaged_weights_twice_changes_nothing() -> None:
    layer = nn.Linear(3, 3)
    average = WeightAverage(layer.parameters(), 0.9)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    average.update()

    average.exchange()
    averaged = layer.weight.detach().clone()
    average.exchange()

    assert torch.equal(layer.weight, before + 1)
    assert torch.all(averaged > before)
    assert torch.all(averaged < before + 1)
