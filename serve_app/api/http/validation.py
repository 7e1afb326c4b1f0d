"""From pydantic's errors to the product's: one sentence with the field, the fault and the nearest known name.

Owns the wording of every schema refusal; pure.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serve_app.errors import BadRequest, MalformedRequest, OutOfBounds, UnknownParameter
from serve_app.settings import nearest

_WANTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "greater_than": ("gt", "over"),
    "less_than": ("lt", "under"),
}
_LENGTHS = {
    "string_too_long": ("max_length", "at most", "characters"),
    "string_too_short": ("min_length", "at least", "characters"),
    "too_long": ("max_length", "at most", "entries"),
}
_CLIP = 60


def refusal(model: type[BaseModel], error: ValidationError) -> BadRequest:
    """Return the first fault of a validation as an error of the product.

    An unknown field comes before all others: a misspelt one is the likely cause of a missing one.
    """
    faults = error.errors(include_url=False)
    details = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    name, kind, context = _name(details["loc"]), details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return UnknownParameter(name, _hint(model, details["loc"]))
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return OutOfBounds(name, clip(str(details["input"])), f"{words} {context[key]}")
    if kind in _LENGTHS:
        key, words, unit = _LENGTHS[kind]
        length = len(details["input"])
        return OutOfBounds(name, f"{length} {unit} long", f"{words} {context[key]} {unit}")
    return MalformedRequest(_sentence(f"'{name}'" if name else "the body", details))


def _sentence(subject: str, details: ErrorDetails) -> str:
    kind = details["type"]
    if kind == "missing":
        return f"{subject} is missing"
    if kind == "unfit":
        return f"{subject} {details['msg']}"
    if kind == "literal_error":
        given, expected = details["input"], str(details.get("ctx", {}).get("expected"))
        shown = json.dumps(given) if isinstance(given, (str, int, float)) else json_type(given)
        return f"{subject} is {clip(shown)}, but must be {expected.replace('False', 'false')}"
    wanted = _WANTED.get(kind)
    if wanted is None:
        return f"{subject} cannot be read: {details['msg']}"
    return f"{subject} must be {wanted}, not {json_type(details['input'])}"


def json_type(value: Any) -> str:
    """Return what JSON calls a value's type, with an article."""
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (type(None), "null"),
        (bool, "a boolean"),
        (int, "an integer"),
        (float, str(value) if isinstance(value, float) else ""),
        (str, "a string"),
        ((list, tuple), "an array"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "an object")


def clip(text: str) -> str:
    """Shorten a caller's own words for an error message."""
    return text if len(text) <= _CLIP else text[:_CLIP] + "..."


def _name(location: tuple[int | str, ...]) -> str:
    """Write a location as people do: `loras[0].scale`; the envelope `parameters` goes without saying."""
    parts = location[1:] if len(location) > 1 and location[0] == "parameters" else location
    name = ""
    for part in parts:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return clip(name)


def _hint(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Return the nearest known name for an unknown field, or where it belongs, or what there is."""
    within = model
    for part in location[:-1]:
        if isinstance(part, str):
            within = _model_in(within.model_fields[part].annotation) or within
    unknown, known = clip(str(location[-1])), list(within.model_fields)
    parameters = within.model_fields.get("parameters")
    inner = _model_in(parameters.annotation) if parameters else None
    if inner is not None and unknown in inner.model_fields:
        return "; it belongs inside 'parameters'"
    return nearest(unknown, known) or f"; what there is: {', '.join(known)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation such as `list[Entry] | None` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
