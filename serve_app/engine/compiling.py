"""Compiling a base's denoiser so that changing adapters compiles nothing again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from serve_app.engine.manifest import adaptable_components


def compile_denoiser(pipeline: DiffusionPipeline, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have torch compile the denoiser at its first call, and once more for each new kind of input.

    In place: a wrapper would rename every parameter. Swaps give parameters other memory with the same shape, stride
    and dtype, which the compiled code reads at each call, so it must not capture addresses: no CUDA graphs.
    """
    denoiser: Any = next(iter(adaptable_components(pipeline).values()))
    denoiser.compile(backend=backend)
