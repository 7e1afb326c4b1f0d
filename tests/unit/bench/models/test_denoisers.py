import pytest
import torch

from serve_app.bench.measuring.options import DType, Model, SwapOptions, Targets
from serve_app.bench.models.denoisers import Denoiser, fill_outline, outline_of

# Parameters in millions, and layers that adapters change, as the models' authors and trainers count them.
PUBLISHED = {
    Model.SD15: (859.5, {Targets.ATTENTION: 128}),
    Model.SDXL: (2567.5, {Targets.ATTENTION: 560, Targets.LINEAR: 722, Targets.ALL: 794}),
    Model.FLUX: (11901.4, {Targets.ATTENTION: 266, Targets.LINEAR: 494}),
}


def tiny(seed: int = 0) -> Denoiser:
    options = SwapOptions(dtype=DType.BFLOAT16, seed=seed)
    return fill_outline(outline_of(options), options)


@pytest.mark.parametrize("model", PUBLISHED)
def test_full_size_denoisers_have_the_published_size_and_layers(model: Model) -> None:
    millions, layers = PUBLISHED[model]
    outline = outline_of(SwapOptions(model=model))
    assert outline.parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert {targets: len(outline.targets(targets)) for targets in layers} == layers


@pytest.mark.parametrize("model", [Model.SD15, pytest.param(Model.SDXL, marks=pytest.mark.slow), Model.FLUX])
def test_a_narrow_denoiser_has_every_layer_of_the_full_one(model: Model) -> None:
    full, narrow = (outline_of(SwapOptions(model=model, is_narrow=is_narrow)) for is_narrow in (False, True))
    assert narrow.targets(Targets.ALL).keys() == full.targets(Targets.ALL).keys()
    assert narrow.parameters < 20e6


def test_weights_are_the_same_for_a_seed_and_differ_between_seeds_and_layers() -> None:
    first, again, other = tiny(), tiny(), tiny(seed=1)
    states = [denoiser.module.state_dict() for denoiser in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])
    queries = [value for name, value in states[0].items() if name.endswith("attn1.to_q.weight")]
    assert not torch.equal(queries[0], queries[1])


def test_a_weight_that_changed_is_noticed_and_put_back() -> None:
    denoiser = tiny()
    names = [name for name, _ in denoiser.module.named_parameters()]
    assert denoiser.changed(names) == []
    weight = denoiser.module.get_parameter("conv_in.weight")
    weight.data.view(-1)[-1] += 1
    assert denoiser.changed(names) == ["conv_in.weight"]
    denoiser.refill(["conv_in.weight"])
    assert denoiser.changed(names) == []
