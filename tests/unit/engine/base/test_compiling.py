"""A compiled denoiser: swaps compile nothing again, names stay, and images are those of the adapters applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import reset

from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.base.pipeline_setup import compile_denoiser
from serve_app.engine.drawing.warmup import warm_up
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.shortage import is_out_of_memory
from serve_app.engine.worker.worker import EngineWorker
from serve_app.settings import AdapterLimits, Defaults
from tests.engine_cases import base_config, load, one_image, request, use_of, wrap
from tests.tiny import denoiser_name, latents, tiny_pipeline
from tests.tiny_adapters import everything, linear, lora
from tests.tiny_forms import Form, put

pytestmark = pytest.mark.slow
SMALL = Defaults(steps=3, guidance_scale=4.0, width=64, height=64)


class Counting:
    """A backend of torch.compile that runs the graph as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        """Take one graph."""
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    reset()
    yield
    reset()


def adapters(pipeline: Any, folder: Path) -> list[ParsedAdapter]:
    """Return adapters of different ranks over different layers, with and without DoRA."""
    tensors = [
        lora(pipeline, rank=2, seed=1),
        lora(pipeline, rank=8, chooses=linear, seed=2),
        lora(pipeline, rank=16, chooses=everything, seed=3),
        lora(pipeline, dora=True, seed=4),
    ]
    manifest = manifest_of(pipeline)
    paths = [put(folder, f"adapter {index}", Form(each)) for index, each in enumerate(tensors)]
    return [parse_adapter(path, path.stem, manifest, AdapterLimits()) for path in paths]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_swaps_among_ranks_and_layers_compile_nothing_again(family: str, tmp_path: Path) -> None:
    live, plain, backend = tiny_pipeline(family), tiny_pipeline(family), Counting()
    compile_denoiser(live, backend=backend)
    weights, reference = (FusedWeights(adaptable_components(each)) for each in (live, plain))
    compositions = [[], *([(adapter, 0.8)] for adapter in adapters(live, tmp_path))]
    compositions.append([*compositions[1], *compositions[3]])
    latents(live)
    compiled = backend.graphs
    assert compiled > 0
    for composition in [*compositions, *reversed(compositions)]:
        weights.bind(weights.prepare(composition))
        reference.apply(composition)
        torch.testing.assert_close(latents(live), latents(plain), rtol=1e-4, atol=1e-4)
    assert backend.graphs == compiled


def test_compiling_renames_no_parameter() -> None:
    live = tiny_pipeline("sd15")
    before = manifest_of(live)
    compile_denoiser(live, backend="eager")
    assert manifest_of(live) == before
    assert not any("_orig_mod" in name for name in getattr(live, denoiser_name(live)).state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own compiler, when it is imported
def test_a_base_is_compiled_where_its_configuration_says_so() -> None:
    for wanted in (True, False):
        base = load("sd15", compile=wanted)
        denoiser = next(iter(base.components.values()))
        compiled = [each for each in denoiser.modules() if getattr(each, "_compiled_call_impl", None) is not None]
        assert bool(compiled) is (base.compiler is not None) is wanted


def test_after_the_warm_up_requests_of_any_size_and_guidance_compile_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live, backend = tiny_pipeline("sd15"), Counting()
    compiler = compile_denoiser(live, backend=backend)
    base, config = wrap(live), base_config("sd15", defaults=SMALL, compile=True)
    base.compiler = compiler
    weights, adapter = FusedWeights(base.components), adapters(live, tmp_path)[0]
    assert (
        warm_up(base, config, torch_threads=1, is_out_of_memory=is_out_of_memory).images
        == config.replica.max_batch_images
    )
    compiled = backend.graphs
    worker = EngineWorker(base, weights, max_batch_images=config.replica.max_batch_images, torch_threads=1)
    try:
        for num_images, changes in ((1, {}), (4, {}), (3, {"guidance_scale": 1.0}), (1, {"width": 96}),
                                    (2, {"height": 128, "guidance_scale": 1.0})):  # fmt: skip
            wanted = request(num_images=num_images, adapters=(use_of("a/b"),), steps=5, **changes)
            worker.submit(wanted, [(adapter, 0.7)]).future.result(timeout=60)
    finally:
        worker.close()
    assert 0 < compiled == compiler.graphs == backend.graphs
    assert "compiled for shapes" not in caplog.text
    compiler(torch.fx.symbolic_trace(torch.nn.Identity()), [])
    assert "number 1 of these" in caplog.text


def test_images_of_a_compiled_base_are_those_of_a_plain_one() -> None:
    base = load("sd15")
    expected = one_image(base, request())
    next(iter(base.components.values())).compile(backend="eager")
    assert one_image(base, request()) == expected
