"""Requests to tiny bases of every family, and what counts how often their denoiser runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, PixelImage, PixelMask
from serve_app.engine.base.loading import LoadedBase
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.families.family import Task
from serve_app.settings import ModelSource
from tests.engine_cases import BASE, photo, request
from tests.tiny_families.build import IMAGE_FAMILIES, NEED_TORCHVISION, tiny_family
from tests.tiny_families.vision import has_torchvision

# One for each kind of latents, of guidance, of scheduler and of task; `make test-faults` tests the others too. (The
# engine's own tests draw with SDXL.)
REPRESENTATIVES = ("flux2_klein", "flux_dev", "qwen_image", "sana_sprint", "sd15", "sd3")
SIDE = 64
STEPS = 2
MASK = PixelMask(SIDE, SIDE, bytes([255] * (SIDE // 2) + [0] * (SIDE // 2)) * SIDE)


def every_family() -> list[Any]:
    """Return the tiny families as parameters; those that need torchvision where it is: see test_vision_families.py."""
    names = [name for name in IMAGE_FAMILIES if has_torchvision() or name not in NEED_TORCHVISION]
    return [pytest.param(name, marks=[] if name in REPRESENTATIVES else pytest.mark.slow) for name in names]


def served(name: str, **settings: Any) -> BasePipeline:
    """Return the tiny base of a family, as the engine serves it."""
    return served_as(tiny_family(name), **settings)


def served_as(live: Any, **settings: Any) -> BasePipeline:
    """Return a base over a pipeline that the test holds too."""
    config = BaseModelConfig(id=BASE, source=ModelSource(embedded="none"), **settings)
    return BasePipeline(config, LoadedBase(live))


def asked(task: Task, **changes: Any) -> GenerationRequest:
    """Return a small request for a task."""
    inputs: dict[str, Any] = {"text": {}, "image": {"image": photo(), "strength": 1.0}, "edit": {"image": photo()}}.get(
        task, {"image": photo(), "mask": MASK, "strength": 1.0}
    )
    return request(**{"steps": STEPS, "width": SIDE, "height": SIDE, **inputs, **changes})


def drawn(pipeline: BasePipeline, wanted: GenerationRequest, **options: Any) -> tuple[PixelImage, tuple[str, ...]]:
    """Check and draw a request alone; return its first image and its warnings."""
    pipeline.check(wanted)
    outcome = pipeline.generate([wanted], **options)
    (images,) = outcome.images
    if not isinstance(images, tuple):
        raise images
    return images[0], outcome.warnings[0]


@contextmanager
def counted_runs(pipeline: BasePipeline) -> Iterator[list[int]]:
    """Count the images that the denoiser looks at, one number for each of its calls."""
    calls: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = args[0] if args else next(named[name] for name in ("hidden_states", "sample", "x") if name in named)
        calls.append(len(values))

    # Ideogram has a second one for the unguided half, which no adapter changes.
    parts = pipeline._variants.whole.components
    denoisers = [part for name, part in parts.items() if name.endswith(pipeline.manifest.denoiser)]
    hooks = [denoiser.register_forward_pre_hook(note, with_kwargs=True) for denoiser in denoisers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
