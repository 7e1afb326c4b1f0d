"""From a draft to a request with nothing left open, within the base's limits.

Owns defaults, bounds and the fixed order of adapters; pure, so that every refusal is a millisecond test. Must not know
where adapters lie or which replica will serve.
"""

from __future__ import annotations

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, ScaledAdapter, UnresolvedRequest, scale_of
from serve_app.errors import OutOfBounds, UnknownScheduler

SIDE_MULTIPLE = 8
MAX_SEED = 2**63 - 1


def resolve_defaults(
    draft: UnresolvedRequest,
    base: BaseModelConfig,
    adapters: tuple[ScaledAdapter, ...],
    *,
    request_id: str,
    seed: int,
) -> GenerationRequest:
    """Fill in what the draft leaves open and check every bound of the base; `seed` is used where the draft has none.

    Raises:
        OutOfBounds: a value outside the limits of the base.
        UnknownScheduler: a scheduler that the base does not offer.
    """
    width, height = _size(draft, base)
    _check_numbers(draft, base)
    _check_adapters(adapters, base)
    if draft.scheduler is not None and draft.scheduler not in base.schedulers:
        raise UnknownScheduler(name=draft.scheduler, base=base.id, choices=", ".join(base.schedulers))
    defaults = base.defaults
    return GenerationRequest(
        request_id=request_id,
        base_id=base.id,
        prompt=draft.prompt,
        negative_prompt=draft.negative_prompt,
        adapters=tuple(sorted(adapters, key=lambda use: use.spec.key)),
        width=width,
        height=height,
        steps=defaults.steps if draft.steps is None else draft.steps,
        guidance_scale=defaults.guidance_scale if draft.guidance_scale is None else draft.guidance_scale,
        scheduler=draft.scheduler,
        seed=seed if draft.seed is None else draft.seed,
        num_images=draft.num_images,
        image=draft.image,
        strength=_strength(draft, base),
        mask=draft.mask,
        num_previews=draft.num_previews,
        priority=draft.priority,
        due=draft.due,
    )


def _strength(draft: UnresolvedRequest, base: BaseModelConfig) -> float | None:
    if draft.image is None:
        return None
    if draft.strength is not None:
        return draft.strength
    # What is masked is to be drawn anew, not to be touched up.
    return base.defaults.strength if draft.mask is None else 1.0


def _size(draft: UnresolvedRequest, base: BaseModelConfig) -> tuple[int, int]:
    """Return width and height: as asked, else the input picture's rounded to what the base can draw, else default."""
    limits = base.limits
    if draft.image is not None and draft.width is None and draft.height is None:
        return _fitted(draft.image.width, draft.image.height, base)
    width = base.defaults.width if draft.width is None else draft.width
    height = base.defaults.height if draft.height is None else draft.height
    for name, side in (("width", width), ("height", height)):
        if side % SIDE_MULTIPLE or not limits.min_side <= side <= limits.max_side:
            raise OutOfBounds(name, side, f"a multiple of {SIDE_MULTIPLE} from {limits.min_side} to {limits.max_side}")
    if width * height > limits.max_pixels:
        raise OutOfBounds("width x height", width * height, f"at most {limits.max_pixels} pixels for {base.id}")
    return width, height


def _fitted(width: int, height: int, base: BaseModelConfig) -> tuple[int, int]:
    """Scale a picture's size, its proportions kept, into the base's limits, and round to what the base can draw."""
    limits = base.limits
    scale = min(1.0, (limits.max_pixels / (width * height)) ** 0.5, limits.max_side / max(width, height))
    scale = max(scale, limits.min_side / min(width, height))
    low = -(-limits.min_side // SIDE_MULTIPLE) * SIDE_MULTIPLE
    high = limits.max_side // SIDE_MULTIPLE * SIDE_MULTIPLE

    def drawable(side: int) -> int:
        return min(high, max(low, int(side * scale) // SIDE_MULTIPLE * SIDE_MULTIPLE))

    fitted = drawable(width), drawable(height)
    if fitted[0] * fitted[1] > limits.max_pixels:
        raise OutOfBounds("image", f"{width}x{height}", f"of proportions that fit {limits.max_pixels} pixels")
    return fitted


def _check_numbers(draft: UnresolvedRequest, base: BaseModelConfig) -> None:
    limits = base.limits
    checks: tuple[tuple[str, float | None, float, float], ...] = (
        ("num_inference_steps", draft.steps, 1, limits.max_steps),
        ("guidance_scale", draft.guidance_scale, 0, limits.max_guidance_scale),
        ("num_images_per_prompt", draft.num_images, 1, limits.max_images),
        ("seed", draft.seed, 0, MAX_SEED),
    )
    for name, value, low, high in checks:
        if value is not None and not low <= value <= high:
            raise OutOfBounds(name, value, f"from {low:g} to {high:g}" if name != "seed" else f"from 0 to {high}")
    if draft.strength is not None and not 0 < draft.strength <= 1:
        raise OutOfBounds("strength", draft.strength, "over 0 and at most 1")
    for name, text in (("prompt", draft.prompt), ("negative_prompt", draft.negative_prompt)):
        if text is not None and len(text) > limits.max_prompt_characters:
            raise OutOfBounds(
                name, f"{len(text)} characters long", f"at most {limits.max_prompt_characters} characters"
            )


def _check_adapters(adapters: tuple[ScaledAdapter, ...], base: BaseModelConfig) -> None:
    limits = base.limits
    if len(adapters) > limits.max_adapters:
        raise OutOfBounds("loras", f"{len(adapters)} adapters", f"at most {limits.max_adapters} for {base.id}")
    for use in adapters:
        high = limits.max_adapter_scale
        for component in ("denoiser", "text_encoder"):
            scale = scale_of(use.scale, component)
            if not abs(scale) <= high:
                raise OutOfBounds(f"scale of {use.spec.id}", scale, f"from -{high:g} to {high:g}")
