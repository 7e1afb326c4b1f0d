"""Whether a base really does what it claims: each task is tried once, tiny and in two steps, before it is served.

Owns what is tried and what comes of a failure. Must not know replicas.
"""

from __future__ import annotations

import logging

import torch

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, PixelImage, PixelMask
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import BaseUnusable, LoraplexError
from serve_app.families.family import Task

log = logging.getLogger(__name__)

STEPS = 2
_FAILURES = (
    LoraplexError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError,
)  # fmt: skip


def try_tasks(pipeline: BasePipeline, base: BaseModelConfig) -> None:
    """Draw once for each task, and withdraw those that fail; before anything else uses the pipeline.

    Raises:
        BaseUnusable: none is left; the sentence says what went wrong.
        torch.OutOfMemoryError: the device has no room even for this.
    """
    if not pipeline.family.is_known:
        log.warning("%s is of a family that was never tried: %s", base.id, pipeline.family.name)
    reason = "its pipeline serves no task"
    for task in pipeline.tasks:
        failure = _failure(pipeline, base, task)
        if failure is not None:
            log.error("%s does not serve '%s': %s", base.id, task, failure)
            pipeline.withdraw(task)
            reason = f"a trial of '{task}' failed: {failure}"
    if not pipeline.tasks:
        raise BaseUnusable(base.id, reason)


def _failure(pipeline: BasePipeline, base: BaseModelConfig, task: Task) -> str | None:
    try:
        with torch.random.fork_rng():
            (images,) = pipeline.generate([_trial(pipeline, base, task)]).images
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        log.debug("the trial of '%s' failed", task, exc_info=True)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    return f"{type(images).__name__}: its images are not finite" if isinstance(images, LoraplexError) else None


def _trial(pipeline: BasePipeline, base: BaseModelConfig, task: Task) -> GenerationRequest:
    multiple = pipeline.family.side_multiple
    side = -(-max(base.limits.min_side, 64) // multiple) * multiple
    grey = PixelImage(side, side, bytes([128]) * (3 * side * side))
    return GenerationRequest(
        request_id="trial",
        base_id=base.id,
        prompt="a trial",
        negative_prompt=None,
        adapters=(),
        width=side,
        height=side,
        steps=max(STEPS, pipeline.family.min_steps),
        guidance_scale=base.defaults.guidance_scale,
        scheduler=None,
        seed=0,
        image=None if task == "text" else grey,
        strength=None if task in ("text", "edit") else 1.0,
        mask=PixelMask(side, side, bytes([255]) * (side * side)) if task == "inpaint" else None,
    )
