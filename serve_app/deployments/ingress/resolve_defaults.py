"""From a draft to a request with nothing left open, within the base's limits.

Owns defaults, bounds and the fixed order of adapters; pure, so that every refusal is a millisecond test. Must not know
where adapters lie or which replica will serve.
"""

from __future__ import annotations

import hashlib

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, ScaledAdapter, UnresolvedRequest, scale_of
from serve_app.errors import MalformedRequest, OutOfBounds, UnknownScheduler
from serve_app.families.family import Family
from serve_app.families.schedulers import REQUEST_OPTIONS, TIMESTEP_SPACINGS, is_known_name, known_names
from serve_app.prompt_syntax import check_taken, weighted

MAX_SEED = 2**63 - 1


def resolve_defaults(
    draft: UnresolvedRequest,
    base: BaseModelConfig,
    adapters: tuple[ScaledAdapter, ...],
    *,
    request_id: str,
    seed: int,
    family: Family | None = None,
) -> GenerationRequest:
    """Fill in what the draft leaves open and check every bound of the base; `seed` is used where the draft has none.

    `family` None means that it is not known yet; then the replica makes the refusals that are made here otherwise.

    Raises:
        MalformedRequest: the family draws from no such inputs, or takes no such parameter.
        OutOfBounds: a value outside the limits of the base.
        UnknownScheduler: a scheduler that the base does not offer.
    """
    known = family or UNKNOWN
    base = base.with_defaults_of(known)
    width, height = _size(draft, base, known.side_multiple)
    _check_numbers(draft, base)
    _check_prompts(draft, base, family)
    _check_adapters(adapters, base)
    _check_scheduler(draft, base)
    steps = _steps(draft, base, known)
    guidance = base.defaults.guidance_scale if draft.guidance_scale is None else draft.guidance_scale
    return GenerationRequest(
        request_id=request_id,
        base_id=base.id,
        prompt=draft.prompt,
        negative_prompt=draft.negative_prompt,
        adapters=tuple(sorted(adapters, key=lambda use: use.spec.key)),
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance,
        scheduler=draft.scheduler,
        seed=seed if draft.seed is None else draft.seed,
        num_images=draft.num_images,
        image=draft.image,
        references=draft.references,
        strength=_strength(draft, base, known),
        mask=draft.mask,
        options=draft.options,
        scheduler_options=draft.scheduler_options,
        denoiser_runs=None if family is None else _runs(draft, guidance, family),
        num_previews=draft.num_previews,
        encoding=draft.encoding,
        priority=draft.priority,
        due=draft.due,
        share=_share_of(draft.key),
        prompt_syntax=draft.prompt_syntax or "plain",
    )


def _share_of(key: str | None) -> str:
    """Return what tells callers apart without telling who they are; all without a key are one."""
    return "" if key is None else hashlib.sha256(key.encode()).hexdigest()[:16]


UNKNOWN = Family("unknown", is_known=False)


def _runs(draft: UnresolvedRequest, guidance: float, family: Family) -> int:
    has_negative = draft.negative_prompt is not None
    return family.evaluations(guidance, draft.options.true_cfg_scale, has_negative_prompt=has_negative)


def _steps(draft: UnresolvedRequest, base: BaseModelConfig, family: Family) -> int:
    """Return how many steps are asked for; a list of noise levels or timesteps says it by its length."""
    levels = {name: values for name in ("sigmas", "timesteps") if (values := getattr(draft.options, name)) is not None}
    if len(levels) > 1:
        raise MalformedRequest("the steps are given either as 'sigmas' or as 'timesteps', not as both")
    for name, values in levels.items():
        if not 1 <= len(values) <= base.limits.max_steps:
            raise OutOfBounds(name, f"{len(values)} long", f"from 1 to {base.limits.max_steps} long")
        if draft.steps not in (None, len(values)):
            raise MalformedRequest(
                f"'num_inference_steps' is {draft.steps}, but '{name}' has {len(values)}; leave it out"
            )
    steps = next((len(values) for values in levels.values()), draft.steps)
    if steps is not None and steps < family.min_steps:
        raise OutOfBounds("num_inference_steps", steps, f"at least {family.min_steps} for {base.id}")
    return max(base.defaults.steps, family.min_steps) if steps is None else steps


def _check_scheduler(draft: UnresolvedRequest, base: BaseModelConfig) -> None:
    name = draft.scheduler
    is_listed = name in base.schedulers if base.schedulers is not None else name is None or is_known_name(name)
    is_own = name is None or name == base.scheduler or (base.schedulers is None and name.endswith("Scheduler"))
    if name is not None and not (is_listed or is_own):
        raise UnknownScheduler(name=name, base=base.id, choices=", ".join(base.schedulers or known_names()))
    for option, value in draft.scheduler_options:
        kind = REQUEST_OPTIONS.get(option)
        if kind is None:
            raise MalformedRequest(f"a request cannot set '{option}'; it may set {', '.join(REQUEST_OPTIONS)}")
        if not isinstance(value, (int, float) if kind is float else kind) or (
            kind is float and isinstance(value, bool)
        ):
            raise MalformedRequest(f"scheduler option '{option}' must be of type {kind.__name__}")
    spacing = dict(draft.scheduler_options).get("timestep_spacing")
    if spacing is not None and spacing not in TIMESTEP_SPACINGS:
        raise OutOfBounds("timestep_spacing", spacing, f"one of {', '.join(TIMESTEP_SPACINGS)}")
    shift = dict(draft.scheduler_options).get("shift")
    if isinstance(shift, int | float) and not 0 < shift <= 100:
        raise OutOfBounds("shift", shift, "over 0 and at most 100")


def _strength(draft: UnresolvedRequest, base: BaseModelConfig, family: Family) -> float | None:
    task = family.task_of(has_image=draft.image is not None, has_mask=draft.mask is not None)
    if not family.serves(task):
        drawn = ", ".join(family.tasks or ())
        raise MalformedRequest(f"{base.id} does not serve '{task}'; it serves {drawn}")
    if draft.image is None:
        return None
    if task == "edit":
        if draft.strength is not None:
            raise MalformedRequest(f"{base.id} takes no 'strength': the prompt says what to change in the picture")
        return None
    if draft.strength is not None:
        return draft.strength
    # A masked area is to be redrawn, not touched up.
    return base.defaults.strength if draft.mask is None else 1.0


def _size(draft: UnresolvedRequest, base: BaseModelConfig, multiple: int) -> tuple[int, int]:
    """Return width and height: as asked, else the input picture's rounded to what the base can draw, else default."""
    limits = base.limits
    if draft.image is not None and draft.width is None and draft.height is None:
        return _fitted(draft.image.width, draft.image.height, base, multiple)
    width = base.defaults.width if draft.width is None else draft.width
    height = base.defaults.height if draft.height is None else draft.height
    for name, side in (("width", width), ("height", height)):
        if side % multiple or not limits.min_side <= side <= limits.max_side:
            raise OutOfBounds(name, side, f"a multiple of {multiple} from {limits.min_side} to {limits.max_side}")
    if width * height > limits.max_pixels:
        raise OutOfBounds("width x height", width * height, f"at most {limits.max_pixels} pixels for {base.id}")
    return width, height


def _fitted(width: int, height: int, base: BaseModelConfig, multiple: int) -> tuple[int, int]:
    """Scale a picture's size, its proportions kept, into the base's limits, and round to what the base can draw."""
    limits = base.limits
    scale = min(1.0, (limits.max_pixels / (width * height)) ** 0.5, limits.max_side / max(width, height))
    scale = max(scale, limits.min_side / min(width, height))
    low = -(-limits.min_side // multiple) * multiple
    high = limits.max_side // multiple * multiple

    def drawable(side: int) -> int:
        return min(high, max(low, int(side * scale) // multiple * multiple))

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
    pictures = 1 + len(draft.references)
    if pictures > limits.max_input_images:
        raise OutOfBounds("image", f"{pictures} pictures", f"at most {limits.max_input_images} for {base.id}")
    for name, text in (("prompt", draft.prompt), ("negative_prompt", draft.negative_prompt)):
        if text is not None and len(text) > limits.max_prompt_characters:
            raise OutOfBounds(
                name, f"{len(text)} characters long", f"at most {limits.max_prompt_characters} characters"
            )


def _check_prompts(draft: UnresolvedRequest, base: BaseModelConfig, family: Family | None) -> None:
    syntax = draft.prompt_syntax
    if syntax is None or syntax == "plain":
        return
    check_taken(syntax, base.id, weighs_words=family is None or family.weighs_words)
    if draft.options.prompt_2 is not None:
        raise MalformedRequest("'prompt_2' goes with 'prompt_syntax' 'plain' only; leave it out")
    weighted(draft.prompt, syntax)
    weighted(draft.negative_prompt or "", syntax, "negative_prompt")


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
