"""The inputs that a base can draw from: text, a picture, a picture and a mask, a picture and an instruction.

Owns the pipelines of one base, which share every module, and which of them a request takes. Must not know how a
request becomes the arguments of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import diffusers

from serve_app.core import GenerationRequest
from serve_app.errors import MalformedRequest
from serve_app.families.family import Family, Task
from serve_app.families.table import family_of

_NEEDS: Mapping[Task, str] = {
    "text": "draws from a picture only; send one",
    "image": "makes images from text only; leave out the picture",
    "inpaint": "cannot redraw a part of a picture; leave out the mask",
    "edit": "makes images from text only; leave out the picture",
}


@dataclass(frozen=True, slots=True)
class TaskPipelines:
    """The pipelines over one set of modules, by task; `whole` is the one that the base was loaded as."""

    whole: Any
    family: Family
    by_task: Mapping[Task, Any]

    def of(self, request: GenerationRequest) -> Any:
        """Return the pipeline that a request takes.

        Raises:
            MalformedRequest: the base has none.
        """
        task = self.task_of(request)
        if task not in self.by_task:
            needs = _NEEDS[task] if "text" in self.by_task or task != "image" else "needs a mask with the picture"
            raise MalformedRequest(f"{request.base_id} {needs}")
        return self.by_task[task]

    def task_of(self, request: GenerationRequest) -> Task:
        """Return what a request draws from."""
        return self.family.task_of(has_image=request.image is not None, has_mask=request.mask is not None)

    def without(self, task: Task) -> TaskPipelines:
        """Return the pipelines but for one task."""
        return replace(self, by_task={name: pipeline for name, pipeline in self.by_task.items() if name != task})

    @property
    def all(self) -> tuple[Any, ...]:
        """Every pipeline once, the one that the base was loaded as first."""
        return tuple({id(pipeline): pipeline for pipeline in (self.whole, *self.by_task.values())}.values())


def variants_of(pipeline: Any, card: str = "") -> TaskPipelines:
    """Return the pipelines over the modules of a loaded one, whose model card is `card`."""
    family = loaded_family(pipeline, card)
    variants = TaskPipelines(pipeline, family, _by_task(pipeline, family))
    for variant in variants.all:
        # An invisible watermark is drawn only where an optional package happens to be installed.
        if hasattr(variant, "watermark"):
            variant.watermark = None
    # `clip_skip` reads the last norm below this name, which transformers 5 no longer has; no module of its own.
    encoder = getattr(pipeline, "text_encoder", None)
    if encoder is not None and hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
        encoder.__dict__["text_model"] = encoder
    return variants


def loaded_family(pipeline: Any, card: str = "") -> Family:
    """Return the family of a loaded pipeline, as its own configuration has it."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    return family_of(type(pipeline).__name__, pipeline.config, getattr(denoiser, "config", None), card)


def parameters_of(pipeline: Any) -> frozenset[str]:
    """Return the names of all parameters of a pipeline's call."""
    return frozenset(signature(type(pipeline).__call__).parameters)


def _by_task(pipeline: Any, family: Family) -> dict[Task, Any]:
    if family.tasks is not None:
        return {task: _as(pipeline, name) for task, name in family.tasks.items()}
    # Loads the pipelines of every family that diffusers knows, which takes a second.
    from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image, AutoPipelineForInpainting

    guessed: dict[Task, Any] = {"text": pipeline}
    others: dict[Task, Any] = {"image": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}
    for task, auto in others.items():
        try:
            guessed[task] = _quiet(auto.from_pipe(pipeline))
        except ValueError:  # diffusers knows none
            continue
    return guessed


def _as(pipeline: Any, name: str) -> Any:
    """Return the same modules in a pipeline of another class of diffusers; `from_pipe` would change their dtype."""
    kind: Any = getattr(diffusers, name)
    if type(pipeline) is kind:
        return pipeline
    modules, settings = kind._get_signature_keys(kind)
    parts = {part: module for part, module in pipeline.components.items() if part in modules}
    return _quiet(kind(**parts, **{name: pipeline.config[name] for name in settings if name in pipeline.config}))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
