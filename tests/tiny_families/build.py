"""Builds tiny pipelines by name: the same weights at every call, each built once in a process."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.copies import Original
from tests.tiny_families import flow, flux, language, newest, noise

BUILDERS: dict[str, Any] = {**noise.BUILDERS, **flow.BUILDERS, **flux.BUILDERS, **language.BUILDERS, **newest.BUILDERS}
# Their processors need torchvision, which is an extra.
NEED_TORCHVISION = ("bria_fibo2", "flux2", "kandinsky5", "kandinsky5_edit", "qwen_image_edit", "qwen_image_edit_plus")
MAKE_VIDEOS = ("wan_t2v",)
IMAGE_FAMILIES = tuple(sorted(set(BUILDERS) - set(MAKE_VIDEOS)))


def tiny_family(name: str) -> Any:
    """Return a fresh pipeline."""
    return _original(name).copy()


@functools.cache
def _original(name: str) -> Original:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipeline = BUILDERS[name]()
        denoisers = [part for name, part in pipeline.components.items() if name.endswith(("unet", "transformer"))]
        with torch.no_grad():
            for parameter in (parameter for denoiser in denoisers for parameter in denoiser.parameters()):
                _enliven(parameter)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return Original(pipeline)


def _enliven(parameter: torch.nn.Parameter) -> None:
    """Give an untrained parameter values that show: some start as zeros, some uninitialised."""
    if not torch.isfinite(parameter).all():
        parameter.normal_(0, 0.02)
    if parameter.ndim > 1:
        parameter.mul_(1.5)
        if not parameter.any():
            parameter.normal_(0, 0.05)
