"""A base family: the facts that the signature of its pipeline class does not give.

Owns the shape of a row and the rules that follow from it: which pipeline serves a task, how often the denoiser runs,
and which parameters change nothing. `serve_app.families.table` owns the rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from serve_app.families.defaults import FamilyDefaults

Task = Literal["text", "image", "inpaint", "edit"]
"""The input of an image: a prompt; a picture that is redrawn by a strength; a picture and a mask; a picture
that the prompt says how to change."""
TASKS: tuple[Task, ...] = get_args(Task)

LatentLayout = Literal["picture", "packed", "patched", "patched channels last", "unpatched", "channels last", "none"]
"""How latents lie between two steps: [n, channels, h, w] or the same of one frame; tokens of 2x2 pixels; tokens of one
pixel, each 2x2 of the VAE's, with the channels of each of the four together or the four of each channel; a picture of
the VAE's pixels, normalized in 2x2 patches; one frame [n, 1, h, w, channels]; or in a form of which no preview is
made."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row: the facts of every base of a pipeline class.

    `tasks` names the pipeline class for each task; None means that diffusers is asked. `tokens` None means the window
    of the base's own tokenizer. `guidance` are the parameters that a request's guidance sets. The denoiser runs
    `guided_runs` times a step where guidance is over `guided_above`, and once otherwise. `has_own_true_cfg` says that
    `true_cfg_scale` is a parameter beside the guidance: with a negative prompt and a scale over 1 it runs twice.
    `sends_levels` are the arguments ("sigmas", "timesteps", "mu") by which the pipeline always tells the scheduler its
    steps, which not every scheduler takes; `unfit_schedulers` take them and fail on the pipeline's values.
    `area_parameter` names what must say which size is drawn, where the pipeline otherwise draws its own.
    `takes_references` says that an edit may be given several pictures, each of its own size; the longer side of one is
    at most `max_aspect_ratio` times the other.
    `prompt_key` is the key of the JSON object that the prompt must be.
    `two_step_arguments` hold for exactly two steps and are None otherwise.
    `structure` is the name that `serve_app.families.structure` has for the layers of its denoiser.
    `reads_guidance` is False where guidance changes nothing.
    """

    name: str
    tasks: Mapping[Task, str] | None = None
    side_multiple: int = 8
    tokens: int | None = None
    guidance: tuple[str, ...] = ("guidance_scale",)
    guided_above: float = 1.0
    guided_runs: int = 2
    has_own_true_cfg: bool = False
    reads_guidance: bool = True
    latents: LatentLayout = "picture"
    shares_passes: bool = True
    sends_levels: tuple[str, ...] = ()
    unfit_schedulers: tuple[str, ...] = ()
    min_steps: int = 1
    area_parameter: Literal["max_area", "default_sample_size", "resolutions"] | None = None
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    prompt_key: str | None = None
    two_step_arguments: tuple[str, ...] = ()
    takes_references: bool = False
    max_aspect_ratio: float = 8.0
    needs_torchvision: bool = False
    defaults: FamilyDefaults = FamilyDefaults()
    structure: str | None = None
    is_known: bool = True

    @property
    def kind(self) -> tuple[object, ...]:
        """What two bases have in common of which one may draw for the other."""
        return self.name, self.structure, self.tasks

    def task_of(self, *, has_image: bool, has_mask: bool) -> Task:
        """Return the task of a request with such inputs; a picture is redrawn where the family can do that."""
        if has_mask:
            return "inpaint"
        if not has_image:
            return "text"
        return "edit" if self.tasks is not None and "image" not in self.tasks and "edit" in self.tasks else "image"

    def worded(self, prompt: str) -> str:
        """Return a prompt in the form that the pipeline reads: a JSON object as it is, plain words in one."""
        if self.prompt_key is None:
            return prompt
        try:
            given: object = json.loads(prompt)
        except (ValueError, RecursionError):
            given = None
        if isinstance(given, dict) and self.prompt_key in given:
            return prompt
        return json.dumps({self.prompt_key: prompt}, ensure_ascii=False)

    def serves(self, task: Task) -> bool:
        """Say whether the family has a pipeline for a task; True where only diffusers knows."""
        return self.tasks is None or task in self.tasks

    @property
    def only_redraws(self) -> bool:
        """Whether every image begins as a noisy picture."""
        return self.tasks is not None and not {"text", "edit"} & set(self.tasks)

    @property
    def weighs_words(self) -> bool:
        """Whether CLIP alone reads its prompts: they may be long, and words in them may have weights."""
        return self.structure in ("sd1", "sdxl") and not self.serves("edit")

    @property
    def previews(self) -> bool:
        """Whether previews can be made of its latents."""
        return self.latents != "none"

    def is_guided(self, guidance_scale: float, true_cfg_scale: float | None, *, has_negative_prompt: bool) -> bool:
        """Say whether each step runs the denoiser for an unguided half too."""
        if self.has_own_true_cfg:
            return has_negative_prompt and true_cfg_scale is not None and true_cfg_scale > 1
        return guidance_scale > self.guided_above

    def evaluations(self, guidance_scale: float, true_cfg_scale: float | None, *, has_negative_prompt: bool) -> int:
        """Return how many times the denoiser runs in each step for one image."""
        is_guided = self.is_guided(guidance_scale, true_cfg_scale, has_negative_prompt=has_negative_prompt)
        return self.guided_runs if is_guided else 1


NEVER = math.inf
"""As `guided_above`: guidance goes into the denoiser as a number, and never runs it twice."""
ALWAYS = -math.inf
"""As `guided_above`: the unguided half is computed at any guidance."""
