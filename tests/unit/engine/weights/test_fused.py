"""What is bound depends on the composition alone, and the loaded tensors are never written."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.settings import AdapterLimits
from tests.tiny import latents, tiny_pipeline
from tests.tiny_adapters import as_kohya, everything, linear, lora
from tests.tiny_forms import (
    Form,
    described,
    fused_by_diffusers,
    modules_in,
    output_projection,
    put,
    unequal,
    weights_of,
    with_text,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {
    "attention": lambda pipe: Form(lora(pipe, seed=1)),
    "everything": lambda pipe: Form(lora(pipe, chooses=everything, seed=2)),
    "linear": lambda pipe: Form(lora(pipe, rank=8, chooses=linear, seed=3)),
    "text": lambda pipe: Form(with_text(pipe, seed=4)),
    "dora": lambda pipe: Form(lora(pipe, dora=True, seed=5)),
    "bias": lambda pipe: Form(lora(pipe, chooses=output_projection, bias=True, seed=6)),
    "other bias": lambda pipe: Form(lora(pipe, chooses=output_projection, bias=True, seed=7)),
}


class Bench:
    """A live tiny SD1.5 with a few adapters, read."""

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, base_weights: Literal["device", "host"] = "device"
    ) -> None:
        self.pipeline = tiny_pipeline("sd15", dtype)
        self.weights = FusedWeights(adaptable_components(self.pipeline), base_weights=base_weights)
        manifest = manifest_of(self.pipeline)
        self.paths = {name: put(folder, name, form(self.pipeline)) for name, form in FORMS.items()}
        self.adapters = {
            name: parse_adapter(path, name, manifest, AdapterLimits()) for name, path in self.paths.items()
        }

    def apply(self, **scales: float) -> None:
        self.weights.apply([(self.adapters[name.replace("_", " ")], scale) for name, scale in scales.items()])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def stranger() -> ParsedAdapter:
    """An adapter that was checked against some other base."""
    delta = LowRank(torch.ones(1, 3), torch.ones(3, 1), 1.0, 1.0)
    return ParsedAdapter("stranger", {"unet": {"no.such.layer": delta}}, Coverage(1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scales",
    [
        {"attention": 0.7, "linear": -0.3},
        {"everything": 0.7, "attention": 1.3, "text": -0.3},
        {"dora": 0.9, "attention": 0.5},
        {"bias": 0.5, "other_bias": 1.5},
    ],
    ids="+".join,
)
def test_several_adapters_equal_set_adapters_and_fuse_lora(
    scales: dict[str, float], dtype: torch.dtype, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, dtype)
    composition = [(bench.paths[name.replace("_", " ")], scale) for name, scale in scales.items()]
    expected = weights_of(fused_by_diffusers("sd15", dtype, composition))

    for each in (bench, Bench(tmp_path, dtype, "host")):
        each.apply(**scales)
        assert unequal(weights_of(each.pipeline), expected) == []


def test_images_equal_those_of_a_pipeline_fused_by_diffusers(bench: Bench) -> None:
    bench.apply(text=0.8)
    reference = fused_by_diffusers("sd15", torch.float32, [(bench.paths["text"], 0.8)])
    reference.unet.requires_grad_(False)
    reference.text_encoder.requires_grad_(False)

    assert torch.equal(latents(bench.pipeline), latents(reference))
    assert not torch.equal(latents(bench.pipeline), latents(tiny_pipeline("sd15")))


def test_any_history_ends_in_the_same_bits(bench: Bench) -> None:
    expected = {}
    for name in FORMS:
        bench.apply(**{name: 0.6})
        expected[name] = weights_of(bench.pipeline)
        bench.apply()
    pristine, chance = weights_of(tiny_pipeline("sd15")), random.Random(0)
    for _ in range(60):
        name = chance.choice([*FORMS, ""])
        bench.apply(**({name: 0.6} if name else {}))
        assert unequal(weights_of(bench.pipeline), expected[name] if name else pristine) == []


def test_the_loaded_tensors_are_never_written(bench: Bench) -> None:
    before = bench.weights.checksum()
    parameters = dict(bench.pipeline.unet.named_parameters())
    pointers = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    bench.apply(everything=0.5, text=0.5)
    assert bench.weights.checksum() == before
    bench.apply()
    assert bench.weights.checksum() == before
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == pointers


def test_parameters_keep_their_identity_and_need_no_gradient(bench: Bench) -> None:
    before = dict(bench.pipeline.unet.named_parameters())
    bench.apply(everything=0.5)
    after = dict(bench.pipeline.unet.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(parameter.requires_grad for parameter in after.values())


def test_parameters_that_wanted_gradients_no_longer_do() -> None:
    module = nn.Linear(4, 4)
    FusedWeights({"unet": module})
    assert not module.weight.requires_grad
    assert not module.bias.requires_grad


def test_a_failure_leaves_the_base_bound(bench: Bench) -> None:
    bench.apply(attention=1.0)
    with pytest.raises(KeyError):
        bench.weights.apply([(bench.adapters["everything"], 1.0), (stranger(), 1.0)])
    assert bench.weights.applied == ()
    assert unequal(weights_of(bench.pipeline), weights_of(tiny_pipeline("sd15"))) == []


def test_an_adapter_applied_after_a_failure_is_whole(bench: Bench) -> None:
    bench.apply(attention=1.0)
    expected = weights_of(bench.pipeline)
    with pytest.raises(KeyError):
        bench.weights.apply([(bench.adapters["everything"], 1.0), (stranger(), 1.0)])
    bench.apply(attention=1.0)
    assert unequal(weights_of(bench.pipeline), expected) == []


def test_scale_zero_still_follows_the_formula_and_other_scales_do_not_linger(bench: Bench) -> None:
    bench.apply(linear=2.0)
    bench.apply(linear=0.0)
    assert unequal(weights_of(bench.pipeline), weights_of(tiny_pipeline("sd15"))) == []
    assert bench.weights.applied == ((bench.adapters["linear"].digest, 0.0),)


def test_the_applied_key_names_digests_and_scales_in_order(bench: Bench) -> None:
    bench.apply(linear=0.5, attention=1.0)
    digests = [bench.adapters[name].digest for name in ("linear", "attention")]
    assert bench.weights.applied == ((digests[0], 0.5), (digests[1], 1.0))
    bench.apply()
    assert bench.weights.applied == ()


def test_fused_buffers_exist_for_touched_layers_only_and_are_reused(bench: Bench) -> None:
    assert bench.weights.fused_buffer_bytes == 0
    bench.apply(attention=1.0)
    touched = [bench.pipeline.unet.get_submodule(name) for name in bench.adapters["attention"].components["unet"]]
    assert bench.weights.fused_buffer_bytes == sum(module.weight.nbytes for module in touched)
    bench.apply()
    bench.apply(dora=1.0)
    assert bench.weights.fused_buffer_bytes == sum(module.weight.nbytes for module in touched)


def test_the_checksum_is_the_same_in_any_pipeline_and_tells_one_changed_bit(bench: Bench) -> None:
    other = tiny_pipeline("sd15")
    assert FusedWeights(adaptable_components(other)).checksum() == bench.weights.checksum()
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1e-6
    assert FusedWeights(adaptable_components(other)).checksum() != bench.weights.checksum()


def test_an_adapter_whose_layers_come_in_another_order_gives_the_same_bits(bench: Bench) -> None:
    adapter = bench.adapters["everything"]
    modules = dict(reversed(adapter.components["unet"].items()))
    bench.apply(everything=1.0)
    expected = weights_of(bench.pipeline)
    bench.weights.apply([(replace(adapter, digest="reversed", components={"unet": modules}), 1.0)])
    assert unequal(weights_of(bench.pipeline), expected) == []


# Where results differ from diffusers' own, and why.


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_kohya_alphas_hold_for_their_own_layer_though_diffusers_takes_the_majority(tmp_path: Path) -> None:
    """The same numbers as peft metadata, which diffusers resolves by name, are what the kohya file means."""
    live = tiny_pipeline("sd15")
    tensors = lora(live, seed=20)
    alphas = {name: 1 + place % 3 for place, name in enumerate(modules_in(tensors))}
    kohya = put(tmp_path, "kohya", Form(as_kohya(tensors, alpha=lambda name: alphas[name])))
    named = put(tmp_path, "named", Form(tensors, described(tensors, "unet", r=4, lora_alpha=4, alpha_pattern=alphas)))
    weights = FusedWeights(adaptable_components(live))
    weights.apply([(parse_adapter(kohya, "kohya", manifest_of(live), AdapterLimits()), 1.0)])

    assert unequal(weights_of(live), weights_of(fused_by_diffusers("sd15", torch.float32, [(named, 1.0)]))) == []
    assert unequal(weights_of(live), weights_of(fused_by_diffusers("sd15", torch.float32, [(kohya, 1.0)]))) != []


def test_kohya_layers_of_the_added_embedding_are_matched_though_diffusers_loses_them(tmp_path: Path) -> None:
    live = tiny_pipeline("sdxl")
    tensors = lora(live, chooses=lambda name, module: name.startswith("add_embedding"), seed=21)
    path = put(tmp_path, "kohya", Form(as_kohya(tensors, alpha=4)))
    adapter = parse_adapter(path, "kohya", manifest_of(live), AdapterLimits())
    assert set(adapter.components["unet"]) == {"add_embedding.linear_1", "add_embedding.linear_2"}


def test_dora_after_another_adapter_norms_the_loaded_weight_though_peft_norms_a_rounded_one(bench: Bench) -> None:
    """Peft takes the first adapter out by subtraction, which rounds; the results agree but for that."""
    bench.apply(attention=0.7, dora=0.9)
    composition = [(bench.paths["attention"], 0.7), (bench.paths["dora"], 0.9)]
    expected = weights_of(fused_by_diffusers("sd15", torch.float32, composition))
    for name, tensor in weights_of(bench.pipeline).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
