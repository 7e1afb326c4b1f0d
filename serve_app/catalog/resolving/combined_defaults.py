"""Which defaults hold where several adapters of one request have their own. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.core import AdapterRef, AdapterSpec, Scale


def with_defaults(spec: AdapterSpec, ref: AdapterRef) -> AdapterSpec:
    """Return an adapter with the defaults of the alias by which it was named, over its own."""
    return spec if ref.defaults == NO_DEFAULTS else replace(spec, defaults=ref.defaults.over(spec.defaults))


def scale_for(spec: AdapterSpec, ref: AdapterRef) -> Scale:
    """Return the scale that a request means: its own, else the adapter's, else 1."""
    scales = (scale for scale in (ref.scale, spec.defaults.scale) if scale is not None)
    return next(scales, 1.0)


def combined_defaults(stated: Sequence[AdapterDefaults]) -> AdapterDefaults:
    """Return the defaults of a request from those of its adapters, in the order of the request.

    Steps, guidance and scheduler belong together and come from one adapter: the first with a scheduler, which a
    few-step adapter cannot do without, else the first that states any. Scales stay with their adapters.
    """
    sampling = [replace(one, scale=None, negative_prompt=None, trigger_words=None) for one in stated]
    with_scheduler = [one for one in sampling if one.scheduler is not None]
    chosen = next(iter([*with_scheduler, *(one for one in sampling if one != NO_DEFAULTS)]), NO_DEFAULTS)
    negative = next((one.negative_prompt for one in stated if one.negative_prompt is not None), None)
    return replace(chosen, negative_prompt=negative)
