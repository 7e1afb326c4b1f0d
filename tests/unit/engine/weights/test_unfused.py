"""Adapters beside quantised layers, in a process that has torchao, which other tests do without.

`test_all_of_this_holds_where_torchao_is_installed` runs the others there.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import TorchAoConfig

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, GenerationResult
from serve_app.demo.embedded import embedded_root
from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.fetching import resolve_source
from serve_app.engine.base.manifest import manifest_of
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.device_cache import DeviceCache
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.integrity import CorruptTensor, IntegrityChecker
from serve_app.engine.weights.unfused import UnfusedAdapters
from serve_app.engine.worker.turns import SharingPolicy
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import BaseUnusable
from serve_app.settings import AdapterLimits
from tests.any_turn import AnyTurn
from tests.apart import BUILD, run_with
from tests.engine_cases import BASE, load, one_image, parsed_adapter, request, use_of
from tests.tiny import denoiser_name, latents, tiny_folder, tiny_pipeline
from tests.tiny_adapters import everything, lora
from tests.tiny_forms import FORMS, Form, put, with_text

HAS_TORCHAO = find_spec("torchao") is not None
packs = pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed here")
WAIT_S = 120.0


def quantised_by_diffusers(family: str, quantization: str, dtype: torch.dtype) -> Any:
    """Return what diffusers loads by itself."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[quantization]
    packing = TorchAoConfig(kind(set_inductor_config=False))
    how = PipelineQuantizationConfig(quant_mapping={denoiser_name(tiny_pipeline(family)): packing})
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_folder(family), dtype=dtype, quantization_config=how)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def live_pipeline(base: BasePipeline) -> Any:
    """Return the diffusers pipeline of a base, as a test may call it."""
    return base._variants.whole


def composed(adapters: Mapping[str, ParsedAdapter], scales: Mapping[str, float]) -> list[tuple[ParsedAdapter, float]]:
    return [(adapters[name], scale) for name, scale in scales.items()]


@packs
@pytest.mark.parametrize(
    ("family", "quantization", "dtype"),
    [
        ("sd15", "int8", "float32"),
        ("flux", "int8", "bfloat16"),
        ("flux", "float8", "float32"),
    ],
)
def test_images_equal_those_of_diffusers_with_adapters_loaded_and_not_fused(
    family: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    reference = quantised_by_diffusers(family, quantization, getattr(torch, dtype))
    base = load(family, quantization=quantization, dtype=dtype)
    live, weights = live_pipeline(base), FusedWeights(base.components)
    forms = {
        "attention": Form(lora(live, seed=1)),
        "everything": Form(lora(live, chooses=everything, seed=2)),
        "text": Form(with_text(live, seed=3)),
        "stabilised": FORMS["metadata, rank-stabilised"](live),
    }
    paths = {name: put(tmp_path, name, form) for name, form in forms.items()}
    adapters = {name: parse_adapter(path, name, base.manifest, AdapterLimits()) for name, path in paths.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that is what a second adapter is
        for name, path in paths.items():
            reference.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    seen: list[torch.Tensor] = []
    for scales in (
        {"attention": 1.0},
        {"everything": 0.7, "text": -0.6},
        {"text": 1.5, "stabilised": 0.4, "attention": -0.3},
    ):
        reference.set_adapters(list(scales), list(scales.values()))
        weights.apply(composed(adapters, scales))
        seen.append(latents(live))
        assert torch.equal(seen[-1], latents(reference))
    reference.disable_lora()
    weights.apply([])
    seen.append(latents(live))
    assert torch.equal(seen[-1], latents(reference))
    assert len({tensor.float().sum().item() for tensor in seen}) == len(seen)


@packs
def test_swaps_write_no_weight_and_a_changed_bit_of_a_packed_one_is_found() -> None:
    base = load("sd15", quantization="int8")
    weights, adapters = FusedWeights(base.components), [parsed_adapter(base.manifest, seed=seed) for seed in range(2)]
    checksum, check = weights.checksum(), IntegrityChecker(weights.checksummed_tensors)
    for composition in ([(adapters[0], 0.7)], [(adapters[1], -1.0), (adapters[0], 0.2)], []):
        weights.apply(composition)
        assert check.check_all() is None
    assert (weights.checksum(), weights.fused_buffer_bytes) == (checksum, 0)
    name = next(name for name in weights.base_tensors if name.endswith(".qdata"))
    weights.base_tensors[name].view(-1)[0] ^= 1
    assert check.check_all() == CorruptTensor(name)
    assert weights.checksum() != checksum


@packs
def test_an_adapter_that_cannot_be_bound_leaves_the_base_bound() -> None:
    base = load("sd15", quantization="int8")
    weights, plain = FusedWeights(base.components), one_image(base, request())
    stranger = LowRank(torch.ones(1, 3), torch.ones(3, 1), 1.0, 1.0)
    weights.apply([(parsed_adapter(base.manifest), 1.0)])
    with pytest.raises(KeyError):
        weights.apply([(ParsedAdapter("stranger", {"unet": {"no.such.layer": stranger}}, Coverage(1, 1)), 1.0)])
    assert weights.applied == ()
    assert one_image(base, request()) == plain


def test_what_is_bound_is_held_on_the_device_and_let_go_with_the_next_swap() -> None:
    live = tiny_pipeline("sd15")
    manifest = manifest_of(live)
    cache = DeviceCache(0, torch.device("cpu"))
    unfused = UnfusedAdapters({"unet": live.unet}, cache.holding)
    one, other = (parsed_adapter(manifest, seed=seed) for seed in range(2))
    for adapters in ([one], [one, other], [other]):
        unfused.apply((), adapters, [1.0] * len(adapters))
        cache.clear()
        assert set(cache.resident) == {adapter.digest for adapter in adapters}
    unfused.restore()
    assert cache.resident == ()


@packs
def test_requests_that_take_turns_between_steps_each_draw_what_they_draw_alone() -> None:
    def wanted(number: int) -> GenerationRequest:
        adapters = (use_of(f"me/{number}", 0.5 + number),) if number else ()
        return request(request_id=f"request-{number}", adapters=adapters, steps=4, seed=number % 2)

    def draw(numbers: Sequence[int], **settings: Any) -> list[GenerationResult]:
        base = load("sd15", quantization="int8")
        known = [parsed_adapter(base.manifest, seed=seed) for seed in range(3)]
        weights = FusedWeights(base.components)
        worker = EngineWorker(base, weights, max_batch_images=1, torch_threads=1, **settings)
        requests = [wanted(number) for number in numbers]
        try:
            jobs = [
                worker.submit(one, [(known[int(use.spec.id[-1])], use.scale) for use in one.adapters])
                for one in requests
            ]
            return [job.future.result(WAIT_S) for job in jobs]
        finally:
            worker.close()

    turns = AnyTurn(1)
    drawn = draw([0, 1, 2, 1], choose=turns, sharing=SharingPolicy(max_in_progress=4), clock=time.perf_counter)
    assert turns.most_begun > 1
    images = [result.images for result in drawn]
    assert images == [result.images for result in draw([0, 1, 2, 1])]
    assert len(set(images)) == 3


@packs
def test_a_folder_that_is_packed_already_is_served_as_it_is(tmp_path: Path) -> None:
    quantised_by_diffusers("sd15", "int8", torch.float32).save_pretrained(tmp_path)
    packed, fresh = loaded({"folder": tmp_path}), load("sd15", quantization="int8")
    assert packed.manifest == fresh.manifest
    assert (packed.abilities().fuses_adapters, load("sd15").abilities().fuses_adapters) == (False, True)
    assert one_image(packed, request()) == one_image(fresh, request())
    for changes, reason in (
        ({"quantization": "int8"}, "its part 'unet' is int8 already; leave out 'quantization'"),
        ({"compile": True}, "'compile' needs full weights"),
    ):
        with pytest.raises(BaseUnusable, match=reason):
            loaded({"folder": tmp_path}, **changes)
    with pytest.raises(BaseUnusable, match="its part 'unet' is int8 already"):
        loaded({"folder": tiny_folder("sd15")}, parts={"unet": {"folder": tmp_path}}, quantization="int8")


@packs
def test_a_denoiser_from_elsewhere_is_quantised_as_that_of_the_folder() -> None:
    folder = embedded_root() / "demo" / "sd15"
    whole = loaded({"folder": folder}, quantization="int8")
    other = loaded({"folder": folder}, parts={"unet": {"folder": folder}}, quantization="int8")
    assert one_image(other, request()) == one_image(whole, request())
    assert one_image(whole, request()) != one_image(loaded({"folder": folder}), request())


def loaded(source: dict[str, Any], **changes: Any) -> BasePipeline:
    """Load a base from any source, as a replica does."""
    config = BaseModelConfig.model_validate({"id": BASE, "source": source, **changes})
    parts = {name: resolve_source(part, None) for name, part in config.part_sources.items()}
    return BasePipeline.load(config, resolve_source(config.source, None), parts=parts, device=torch.device("cpu"))


@pytest.mark.parametrize("quantization", ["nf4", *([] if HAS_TORCHAO else ["int8", "float8"])])
def test_a_base_that_cannot_be_quantised_here_is_refused_with_what_is_missing(quantization: str) -> None:
    reason = "it needs the package bitsandbytes" if quantization == "nf4" else r"torchao.*loraplex\[quantization\]"
    with pytest.raises(BaseUnusable, match=reason):
        load("sd15", quantization=quantization)


@pytest.mark.slow
@pytest.mark.skipif(HAS_TORCHAO, reason="the others run here")
@pytest.mark.timeout(600)
def test_all_of_this_holds_where_torchao_is_installed() -> None:
    folder = BUILD / "torchao"
    if not folder.is_dir():
        pytest.skip("torchao is not in build/torchao: make .venv/.dev")
    done = run_with(folder, "pytest", "-q", "-p", "no:xdist", "-W", "ignore:invalid escape", __file__)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 skipped" in done.stdout.splitlines()[-1]
