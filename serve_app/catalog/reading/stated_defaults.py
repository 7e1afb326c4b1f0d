"""The defaults of an adapter as its card or its sidecar files state them.

Pure, and never raises: strangers write these files, so that a value which cannot be meant counts as not said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.core import SchedulerOption
from serve_app.families.schedulers import REQUEST_OPTIONS

T = TypeVar("T")

MAX_TEXT_CHARACTERS = 1024
MAX_NUMBER = 1000
MAX_LEVELS = 1000


def stated_defaults(data: object) -> AdapterDefaults:
    """Return the defaults that a mapping states, by the names that a request has for them."""
    if not isinstance(data, Mapping):
        return AdapterDefaults()
    stated = cast("Mapping[object, object]", data)
    return AdapterDefaults(
        scale=_number(stated.get("scale")),
        steps=_whole(stated.get("num_inference_steps")),
        guidance_scale=_number(stated.get("guidance_scale"), least=0.0),
        scheduler=text_of(stated.get("scheduler")),
        scheduler_options=_options(stated.get("scheduler_options")),
        sigmas=_all(stated.get("sigmas"), lambda value: _number(value, least=0.0)),
        timesteps=_all(stated.get("timesteps"), lambda value: _whole(value, least=0)),
        negative_prompt=text_of(stated.get("negative_prompt")),
        trigger_words=trigger_words(stated.get("trigger_words")),
    )


def trigger_words(value: object) -> str | None:
    """Return words, or a list of them, as one text for a prompt."""
    if not isinstance(value, list):
        return text_of(value)
    words = [text_of(one) for one in cast("list[object]", value)]
    return text_of(", ".join(dict.fromkeys(word.strip(" ,") for word in words if word is not None)))


def text_of(value: object) -> str | None:
    """Return a text that says something and is not overlong, or None."""
    text = value.strip() if isinstance(value, str) else ""
    return text if text and len(text) <= MAX_TEXT_CHARACTERS else None


def _number(value: object, *, least: float = -MAX_NUMBER) -> float | None:
    try:
        number = float(cast("str", value))
    except (TypeError, ValueError):
        return None
    is_meant = not isinstance(value, bool) and math.isfinite(number) and least <= number <= MAX_NUMBER
    return number if is_meant else None


def _whole(value: object, *, least: int = 1) -> int | None:
    number = _number(value, least=least)
    return int(number) if number is not None and number == int(number) else None


def _all(value: object, read: Callable[[object], T | None]) -> tuple[T, ...] | None:
    values = cast("list[object]", value) if isinstance(value, list) else []
    numbers = [number for one in values[:MAX_LEVELS] if (number := read(one)) is not None]
    return tuple(numbers) if numbers and len(numbers) == len(values) else None


def _options(value: object) -> tuple[tuple[str, SchedulerOption], ...]:
    options = cast("Mapping[object, object]", value) if isinstance(value, Mapping) else {}
    read: dict[str, SchedulerOption] = {}
    for name, kind in REQUEST_OPTIONS.items():
        option = options.get(name)
        told = _boolean(option) if kind is bool else _number(option) if kind is float else text_of(option)
        if told is not None:
            read[name] = told
    return tuple(sorted(read.items()))


def _boolean(value: object) -> bool | None:
    return {"true": True, "false": False}.get(str(value).lower())
