"""The abilities of one loaded base, as its replicas found them and `/v1/bases` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.core import PromptSyntax
from serve_app.families.family import Task


@dataclass(frozen=True, slots=True)
class BaseAbilities:
    """The options of requests to a base.

    `parameters` are the optional ones, by task: each task in it was tried. `tokens` is how much of a prompt is read.
    `previews` says whether streams can carry any, `references` whether an edit may be given several
    pictures. `defaults` are the values of a request that gives none. `prompt_syntaxes` are how prompts may be written.
    `fuses_adapters` is False where they lie beside quantised layers.
    """

    pipeline: str
    family: str
    parameters: Mapping[Task, tuple[str, ...]]
    schedulers: tuple[str, ...]
    side_multiple: int
    min_steps: int
    tokens: int | None
    previews: bool
    references: bool = False
    defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    prompt_syntaxes: tuple[PromptSyntax, ...] = ("plain",)
    fuses_adapters: bool = True
