"""How a loaded pipeline is set up: memory format, and how its VAE takes large pictures and several at once.

Owns the choices; `loraplex bench pipeline` measures each, and docs/benchmarks.md says what was found. Attention is
torch's own scaled dot product, which diffusers takes by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from serve_app.config import BaseModelConfig
from serve_app.engine.base.manifest import adaptable_components

log = logging.getLogger(__name__)
# Up to this many times the side that it was trained for, a VAE decodes a picture whole.
TILES = 2


def configure_pipeline(pipeline: Any, config: BaseModelConfig) -> None:
    """Set up a pipeline that is on its device; to be called once, before anything else looks at its weights."""
    is_on_gpu = pipeline.vae.device.type == "cuda"  # the pipeline would look at all of its modules
    if config.memory_format == "channels_last" or (config.memory_format == "auto" and is_on_gpu):
        set_memory_format(pipeline, torch.channels_last)
    decode_one_by_one(pipeline.vae)
    if config.vae_tiling == "always" or (config.vae_tiling == "auto" and is_on_gpu):
        decode_by_tiles(pipeline.vae, TILES if config.vae_tiling == "auto" else 1)


def set_memory_format(pipeline: Any, memory_format: torch.memory_format) -> None:
    """Lay out the weights of the convolutions of denoiser and VAE; values follow them.

    A part with three-dimensional convolutions, such as a video model's VAE, has no such layout and stays as it is.
    """
    # Untyped: torch's stubs lack this form of `to`.
    denoiser: Any = next(iter(adaptable_components(pipeline).values()))
    for module in (denoiser, pipeline.vae):
        if all(parameter.ndim <= 4 for parameter in module.parameters()):
            module.to(memory_format=memory_format)


def decode_one_by_one(vae: Any) -> None:
    """Have the images of a pass decoded one after another: each as it would be alone, in the memory of one."""
    if hasattr(vae, "use_slicing"):
        vae.use_slicing = True


def decode_by_tiles(vae: Any, times: int) -> None:
    """Have images with a side over `times` the trained one decoded in overlapping tiles of that size."""
    if hasattr(vae, "use_tiling") and hasattr(vae, "tile_latent_min_size"):
        vae.use_tiling = True
        vae.tile_sample_min_size *= times
        vae.tile_latent_min_size *= times


class CountingCompiler:
    """A backend of torch.compile that counts what it is given: what comes in traffic makes a caller wait."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        """`backend` does the work; "inductor" is torch's own."""
        self._backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        self._expected: int | None = None
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        """Compile one graph."""
        self.graphs += 1
        if self._expected is not None:
            more = self.graphs - self._expected
            log.warning("a request has the denoiser compiled for shapes that no warm-up had, number %d of these", more)
        return self._backend(graph, inputs, **options)

    def expect_no_more(self) -> None:
        """Log from now on what is compiled: the warm-up is over."""
        self._expected = self.graphs


def compile_denoiser(
    pipeline: DiffusionPipeline, *, backend: str | Callable[..., Any] = "inductor"
) -> CountingCompiler:
    """Have torch compile the denoiser at its first calls, and once more for new kinds of input; returns what counts.

    By region where its class says which blocks repeat: one graph serves all blocks of a shape, sizes become dynamic
    at the second one, and starting takes a fraction of the time. In place: a wrapper would rename every parameter.
    Swaps give parameters other memory with the same shape, stride and dtype, which the compiled code reads at each
    call, so it must not capture addresses: no CUDA graphs.
    """
    denoiser: Any = next(iter(adaptable_components(pipeline).values()))
    compiler = CountingCompiler(backend)
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(backend=compiler)
    else:
        denoiser.compile(backend=compiler)
    return compiler
