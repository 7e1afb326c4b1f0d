"""The defaults of adapters in a request that leaves them open. Pure."""

from __future__ import annotations

from dataclasses import replace

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.catalog.catalog import Resolution
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterSpec, GenerationRequest, PixelImage, ScaledAdapter, UnresolvedRequest
from serve_app.deployments.ingress.resolve_defaults import resolve_defaults
from serve_app.errors import LoraplexError, MalformedRequest
from serve_app.families.family import Family


def resolve_with_adapters(
    draft: UnresolvedRequest, resolution: Resolution, *, request_id: str, seed: int, family: Family | None
) -> GenerationRequest:
    """Return the request with nothing left open: its own words, then its adapters' defaults, then those of the base.

    Raises:
        MalformedRequest: the adapters' defaults are outside the limits of the base.
        LoraplexError: as for `resolve_defaults`.
    """
    base, adapters = resolution.base, resolution.adapters
    # A value that the request sets itself is refused as the request's.
    request = resolve_defaults(draft, base, adapters, request_id=request_id, seed=seed, family=family)
    if resolution.defaults == NO_DEFAULTS:
        return request
    filled = with_adapter_defaults(draft, resolution.defaults, base, family)
    try:
        return resolve_defaults(filled, base, adapters, request_id=request_id, seed=seed, family=family)
    except LoraplexError as error:
        named = " and ".join(use.spec.id for use in adapters)
        raise MalformedRequest(
            f"the defaults of {named} do not fit {base.id}: {error}; say in the request what should hold instead"
        ) from None


def check_defaults(spec: AdapterSpec, base: BaseModelConfig, family: Family | None) -> None:
    """Refuse defaults that no request on the base could take; raises as `resolve_with_adapters` does."""
    used = ScaledAdapter(spec, 1.0 if spec.defaults.scale is None else spec.defaults.scale)
    resolution = Resolution(base, (used,), spec.defaults)
    # A base that only edits draws from nothing else.
    image = (
        None if family is None or family.serves("text") else PixelImage(base.defaults.width, base.defaults.height, b"")
    )
    resolve_with_adapters(UnresolvedRequest("", image=image), resolution, request_id="", seed=0, family=family)


def with_adapter_defaults(
    draft: UnresolvedRequest, defaults: AdapterDefaults, base: BaseModelConfig, family: Family | None
) -> UnresolvedRequest:
    """Return the draft with its adapters' defaults where it says nothing itself.

    Options of a scheduler are those of the default one, so that a scheduler of the request's own gets none of them. A
    negative prompt is set only where the base would read it.
    """
    options = draft.options
    has_steps = any(one is not None for one in (draft.steps, options.sigmas, options.timesteps))
    if not has_steps:
        options = replace(options, sigmas=defaults.sigmas, timesteps=defaults.timesteps)
    guidance = defaults.guidance_scale if draft.guidance_scale is None else draft.guidance_scale
    used = base.defaults.guidance_scale if guidance is None else guidance
    reads_negative = family is not None and family.is_guided(used, options.true_cfg_scale, has_negative_prompt=True)
    has_own = draft.negative_prompt is not None or not reads_negative
    return replace(
        draft,
        options=options,
        steps=draft.steps if has_steps else defaults.steps,
        guidance_scale=guidance,
        scheduler=defaults.scheduler if draft.scheduler is None else draft.scheduler,
        scheduler_options=draft.scheduler_options or (defaults.scheduler_options if draft.scheduler is None else ()),
        negative_prompt=draft.negative_prompt if has_own else defaults.negative_prompt,
    )
