"""A denoiser with random weights, without a download and in seconds.

Owns how it is built and filled, and that its weights can be put back to the bit: diffusers' own way writes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from serve_app.bench.measuring.options import SwapOptions, Targets
from serve_app.bench.models.architectures import ARCHITECTURES, Architecture
from serve_app.engine.adapters.deltas import dtype_named

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
BLOCKS = ("attentions.", "transformer_blocks.")
FILL_VALUES = 1 << 22
FILL_STRIDE = 64 * 7919
SPREAD = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A denoiser's module tree without weights: every parameter is on torch's meta device."""

    architecture: Architecture
    module: nn.Module

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def targets(self, chosen: Targets) -> dict[str, torch.Size]:
        """Return module name -> weight shape of the layers that adapters shall change."""
        return {
            name: module.weight.shape
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and _is_target(name, module, chosen)
        }


@dataclass(frozen=True, slots=True, eq=False)
class Denoiser:
    """The filled module in a pipeline that has nothing else, and the values to put back."""

    architecture: Architecture
    module: nn.Module
    pipeline: DiffusionPipeline
    fill: RandomFill

    def refill(self, names: Iterable[str]) -> None:
        """Give the named parameters the values that they had at first."""
        for name in names:
            self.fill.write(name)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Return which of the named parameters have other values than at first."""
        return [name for name in names if not self.fill.matches(name)]


class RandomFill:
    """Random values for the parameters of a module: the same for the same seed, name and shape.

    Values repeat after `FILL_VALUES`, and every parameter starts elsewhere: drawing billions would take minutes.
    """

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._parameters = dict(module.named_parameters())
        self._starts = {name: at * FILL_STRIDE % FILL_VALUES for at, name in enumerate(self._parameters)}
        first = next(iter(self._parameters.values()))
        draw = torch.randn(FILL_VALUES, generator=torch.Generator().manual_seed(seed)) * SPREAD
        self._values = draw.to(first.device, first.dtype)
        self._around_one = (draw + 1).to(first.device, first.dtype)

    def write(self, name: str) -> None:
        """Fill one parameter."""
        for part, values in self._pieces(name):
            part.copy_(values)

    def matches(self, name: str) -> bool:
        """Say whether a parameter has its values, to the bit."""
        return all(torch.equal(part, values) for part, values in self._pieces(name))

    def _pieces(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        parameter = self._parameters[name]
        # A norm's weight is about one; else deep models multiply their activations away.
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        values, flat, done = self._around_one if is_norm else self._values, parameter.data.view(-1), 0
        start = self._starts[name]
        while done < flat.numel():
            count = min(flat.numel() - done, FILL_VALUES - start)
            yield flat[done : done + count], values[start : start + count]
            done, start = done + count, 0


def outline_of(options: SwapOptions) -> Outline:
    """Build the module tree alone; takes no memory to speak of."""
    architecture = ARCHITECTURES[options.model]
    model_class = getattr(diffusers, architecture.denoiser)
    with torch.device("meta"):
        module = model_class(**architecture.configuration(is_narrow=options.is_narrow))
    return Outline(architecture, module.to(dtype_named(options.dtype)).eval().requires_grad_(False))


def fill_outline(outline: Outline, options: SwapOptions) -> Denoiser:
    """Give an outline memory and random weights; the outline's module becomes the denoiser's."""
    assert not list(outline.module.buffers()), "buffers would stay uninitialised"
    module = outline.module.to_empty(device=torch.device(options.device))
    fill = RandomFill(module, options.seed)
    denoiser = Denoiser(outline.architecture, module, pipeline_of(outline.architecture, module), fill)
    denoiser.refill(name for name, _ in module.named_parameters())
    return denoiser


def pipeline_of(architecture: Architecture, module: nn.Module) -> DiffusionPipeline:
    """Return a pipeline whose only part is the denoiser; loading adapters needs no other."""
    pipeline_class: Any = getattr(diffusers, architecture.pipeline)
    is_flow = architecture.component == "transformer"
    scheduler_class = getattr(diffusers, "FlowMatchEulerDiscreteScheduler" if is_flow else "EulerDiscreteScheduler")
    scheduler = scheduler_class() if is_flow else scheduler_class(steps_offset=1)
    given: dict[str, Any] = {architecture.component: module, "scheduler": scheduler}
    wanted = inspect.signature(pipeline_class.__init__).parameters.values()
    for parameter in wanted:
        if parameter.name != "self" and parameter.default is inspect.Parameter.empty:
            given.setdefault(parameter.name, None)
    if "requires_safety_checker" in (parameter.name for parameter in wanted):
        given["requires_safety_checker"] = False
    return pipeline_class(**given)


def _is_target(name: str, module: nn.Module, chosen: Targets) -> bool:
    if chosen is Targets.ALL:
        return True
    in_block = any(block in name for block in BLOCKS)
    if chosen is Targets.ATTENTION:
        return in_block and name.endswith(ATTENTION)
    return in_block and isinstance(module, nn.Linear)
