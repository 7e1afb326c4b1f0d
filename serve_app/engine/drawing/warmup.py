"""Warm-up before the first request: compiling, and the set-up of devices at first use."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest
from serve_app.engine.drawing.pipeline import BasePipeline

log = logging.getLogger(__name__)

# Denoisers are called with other kinds of values at their second step.
STEPS = 2


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How long it took, how many images of the default size fit one pass, and what such a pass took of a GPU."""

    seconds: float
    images: int
    pass_bytes: int


def warm_up(
    pipeline: BasePipeline,
    base: BaseModelConfig,
    *,
    torch_threads: int,
    is_out_of_memory: Callable[[BaseException], bool],
) -> WarmUp:
    """Draw the base's default picture, as the largest batch that fits and alone.

    A batch that finds no room is halved, as requests will be; where not even one image fits, that is logged, since
    smaller ones may. Call it before anything else uses the pipeline. It computes with `torch_threads`, in a thread of
    its own: their number is part of what compiled code depends on. Where the denoiser is compiled, it draws with
    guidance and without. What still compiles later is logged.
    """
    began, device = time.monotonic(), pipeline.device

    def draw(num_images: int, guidance_scale: float = base.defaults.guidance_scale) -> bool:
        try:
            pipeline.generate([_picture(base, num_images, guidance_scale)])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def run() -> tuple[int, int]:
        torch.set_num_threads(torch_threads)  # counts for the thread that says it
        images = base.replica.max_batch_images
        before = _allocated(device)
        while not draw(images):
            _free(pipeline)
            log.warning("%s: %d images of the default size do not fit one pass", base.id, images)
            if images == 1:
                return 0, 0
            images //= 2
        pass_bytes = _peak(device) - before
        usual = (images, base.defaults.guidance_scale)
        kinds = itertools.product(sorted({images, 1}), _guidances(pipeline, base))
        for num_images, guidance_scale in kinds:
            if (num_images, guidance_scale) != usual:
                draw(num_images, guidance_scale)
        return images, pass_bytes

    with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as thread:
        images, pass_bytes = thread.submit(run).result()
    if pipeline.compiler is not None:
        pipeline.compiler.expect_no_more()
    return WarmUp(time.monotonic() - began, images, pass_bytes)


def _guidances(pipeline: BasePipeline, base: BaseModelConfig) -> tuple[float, ...]:
    """Return the guidance that a warm-up draws with: the default, and where it matters none or some."""
    above, usual = pipeline.family.guided_above, base.defaults.guidance_scale
    if not base.compile or pipeline.family.has_own_true_cfg or not math.isfinite(above):
        return (usual,)
    return usual, above if usual > above else above + 1


def _allocated(device: torch.device) -> int:
    """Return what torch has of a GPU, and begin to watch for its peak."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _free(pipeline: BasePipeline) -> None:
    gc.collect()
    if pipeline.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(pipeline.device)
    pipeline.restore_dtypes()


def _picture(base: BaseModelConfig, num_images: int, guidance_scale: float) -> GenerationRequest:
    defaults = base.defaults
    return GenerationRequest(
        request_id="warm-up",
        base_id=base.id,
        prompt="",
        negative_prompt=None,
        adapters=(),
        width=defaults.width,
        height=defaults.height,
        steps=min(STEPS, defaults.steps),
        guidance_scale=guidance_scale,
        scheduler=None,
        seed=0,
        num_images=num_images,
    )
