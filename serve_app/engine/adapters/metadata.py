"""Reads a file's own metadata on scaling, strictly.

Owns the whitelist of `lora_adapter_metadata`, the table that diffusers writes beside an adapter's tensors. Nothing
from it reaches an import or a peft configuration, and settings that would change more than scaling are refused.
Patterns are compared as literal names, or by RE2, whose time grows with the text alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import re2

from serve_app.engine.adapters.deltas import divisor_of
from serve_app.engine.adapters.safetensors_file import shown
from serve_app.engine.base.manifest import BaseManifest
from serve_app.refusals import MalformedFile, UnsupportedMethod

METADATA_KEY = "lora_adapter_metadata"

# Settings that speak of training or of book-keeping, and change nothing about what the tensors mean.
FREE = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "ephemeral_gpu_offload",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    )
)
# Ways of initialising that leave the base's own weights as they are.
HARMLESS_STARTS: tuple[object, ...] = (True, False, None, "gaussian", "eva", "orthogonal")
# Longer ones are none that a person writes.
MAX_EXPRESSION = 1000
EXPRESSION_OPTIONS = re2.Options()
EXPRESSION_OPTIONS.log_errors = False
PATTERN_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


@dataclass(frozen=True, slots=True)
class Scaling:
    """How one component's layers are scaled, by the file's metadata.

    `rank` and `alpha` hold for all layers that no pattern names; None where the file does not say.
    """

    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict[str, float])
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    is_rank_stabilised: bool = False
    is_dora: bool | None = None
    has_bias: bool | None = None

    def rank_of(self, module: str) -> int | None:
        """Return the rank that the metadata gives for a module."""
        return _resolve(self.ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module; peft's default is 8 once there is metadata."""
        return _resolve(self.alphas, module, 8.0 if self.alpha is None else self.alpha)

    def divisor_of(self, rank: int) -> float:
        """Return what alpha is divided by."""
        return divisor_of(rank, is_rank_stabilised=self.is_rank_stabilised)


def read_scalings(
    metadata: Mapping[str, str], components: Iterable[str], unnamed: str, name: str
) -> dict[str, Scaling]:
    """Return the scaling of each component that the metadata names; values without a component are those of `unnamed`.

    Raises:
        MalformedFile: the metadata is not what diffusers writes.
        UnsupportedMethod: it asks for something other than scaling.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise MalformedFile(name, f"its metadata '{METADATA_KEY}' is not a JSON table")
    if table and not any(isinstance(key, str) and "." in key for key in table):
        return {unnamed: _scaling(table, name)}  # what a model of diffusers saves by itself
    return {component: _scaling(settings, name) for component, settings in _by_component(table, components).items()}


def read_settings(text: str, manifest: BaseManifest, name: str) -> dict[str, Scaling]:
    """Return the scaling that the text of peft's `adapter_config.json` gives, which lies beside the file.

    Those of several folders are one table, with the folder's name before each setting.

    Raises:
        MalformedFile: it is not what peft writes.
        UnsupportedMethod: it asks for something other than scaling, or for another method than LoRA.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise MalformedFile(name, "the 'adapter_config.json' beside its file is not a JSON table")
    tables = _by_component(settings, manifest.components) or {manifest.denoiser: settings}
    for table in tables.values():
        method = table.get("peft_type", "LORA")
        if method != "LORA":
            raise UnsupportedMethod(name, f"it uses {shown(str(method))}, as its 'adapter_config.json' says, not LoRA")
    return {component: _scaling(table, name) for component, table in tables.items()}


def _by_component(table: Mapping[str, Any], components: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of each component that a table has some for, without the component's name."""
    found: dict[str, dict[str, Any]] = {}
    for component in components:
        prefix = component + "."
        settings = {key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)}
        if settings:
            found[component] = settings
    return found


def _scaling(settings: dict[str, Any], name: str) -> Scaling:
    _refuse_beyond_scaling(settings, name)
    rank = _number(settings.pop("r", None), "r", name)
    if rank is not None and (rank != int(rank) or rank < 1):
        raise MalformedFile(name, "its metadata gives a rank that is no whole number")
    ranks = settings.pop("rank_pattern", None)
    if isinstance(ranks, dict) and not all(_is_readable(pattern) for pattern in ranks):
        rank, ranks = None, None  # the shapes tell the ranks
    return Scaling(
        rank=None if rank is None else int(rank),
        alpha=_number(settings.pop("lora_alpha", None), "lora_alpha", name),
        ranks=_pattern(ranks, "rank_pattern", name),
        alphas=_pattern(settings.pop("alpha_pattern", None), "alpha_pattern", name),
        is_rank_stabilised=bool(_flag(settings.pop("use_rslora", None), "use_rslora", name)),
        is_dora=_flag(settings.pop("use_dora", None), "use_dora", name),
        has_bias=_flag(settings.pop("lora_bias", None), "lora_bias", name),
    )


KNOWN = frozenset(("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"))


def _refuse_beyond_scaling(settings: dict[str, Any], name: str) -> None:
    if settings.get("init_lora_weights", True) not in HARMLESS_STARTS:
        raise UnsupportedMethod(name, "its metadata asks for an initialisation that changes the base's weights")
    for key, value in settings.items():
        is_empty = not value or value == "none"
        if key not in FREE and key not in KNOWN and key != "init_lora_weights" and not is_empty:
            raise UnsupportedMethod(name, f"its metadata asks for '{shown(key)}', which is not served")


def _number(value: Any, key: str, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MalformedFile(name, f"its metadata gives '{key}' as something other than a finite number")
    return float(value)


def _flag(value: Any, key: str, name: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise MalformedFile(name, f"its metadata gives '{key}' as something other than true or false")


def _pattern(value: Any, key: str, name: str) -> dict[str, float]:
    """Return pattern -> number, in the file's order."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedFile(name, f"its metadata gives '{key}' as something other than a table")
    numbers: dict[str, float] = {}
    for pattern, number in value.items():
        if not _is_readable(pattern):
            raise UnsupportedMethod(
                name, f"its metadata's '{key}' uses the regular expression '{shown(pattern)}', which RE2 does not read"
            )
        amount = _number(number, key, name)
        if amount is None:
            raise MalformedFile(name, f"its metadata's '{key}' has an empty value")
        is_exact = pattern.startswith("^")
        numbers[f"{'^' * is_exact}{_module_of(pattern)}" if _is_literal(pattern) else pattern] = amount
    return numbers


def _module_of(pattern: str) -> str:
    return pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")


@lru_cache(maxsize=8192)
def _is_literal(pattern: str) -> bool:
    return set(_module_of(pattern)) <= PATTERN_LETTERS


def _is_readable(pattern: str) -> bool:
    return _is_literal(pattern) or (len(pattern) <= MAX_EXPRESSION and _expression(pattern) is not None)


@lru_cache(maxsize=4096)
def _expression(pattern: str) -> Any:
    """Return what peft would search with, compiled; None where RE2 does not read it."""
    try:
        return re2.compile(rf"(.*\.)?({pattern})$", EXPRESSION_OPTIONS)
    except re2.error:
        return None


def _resolve(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the first pattern's value whose name is the module or a dotted end of it, as peft picks it."""
    for pattern, value in patterns.items():
        if not _is_literal(pattern):
            if _expression(pattern).match(module):
                return value
            continue
        exact = pattern.removeprefix("^")
        if module == exact or (pattern == exact and module.endswith("." + exact)):
            return value
    return default
