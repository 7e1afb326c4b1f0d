"""What the first request would pay, paid before it comes: compiling, and what devices set up at first use."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest
from serve_app.engine.drawing.pipeline import BasePipeline

# Denoisers are called with other kinds of values at their second step.
STEPS = 2


def warm_up(pipeline: BasePipeline, base: BaseModelConfig, *, torch_threads: int) -> float:
    """Draw the base's default picture, alone and as the largest batch, and return how many seconds that took.

    Call it before anything else uses the pipeline. It computes with `torch_threads`, in a thread of its own: their
    number is part of what compiled code depends on. Whatever else a request may choose that changes shapes (its size,
    guidance or none) compiles when it first comes.
    """

    def draw() -> None:
        torch.set_num_threads(torch_threads)  # counts for the thread that says it
        for num_images in sorted({1, base.replica.max_batch_images}):
            pipeline.generate([_picture(base, num_images)])

    began = time.monotonic()
    with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as thread:
        thread.submit(draw).result()
    return time.monotonic() - began


def _picture(base: BaseModelConfig, num_images: int) -> GenerationRequest:
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
        guidance_scale=defaults.guidance_scale,
        scheduler=None,
        seed=0,
        num_images=num_images,
    )
