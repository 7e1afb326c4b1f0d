"""From requests to the arguments of one pipeline call, as the base's family means them.

Owns which parameter of diffusers each field of a request sets, and what is refused because a pipeline takes no such
parameter. Must not know schedulers, devices or passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from serve_app.core import GenerationRequest, PixelImage
from serve_app.engine.base.task_pipelines import parameters_of
from serve_app.engine.drawing.pixels import as_reference, fitted, fitted_mask
from serve_app.engine.drawing.texts import text_encoders_of
from serve_app.errors import MalformedRequest, OutOfBounds
from serve_app.families.family import Family

MAX_SEED = 2**64 - 1
# Stands for no negative prompt where guidance needs one, as on the cards of these families.
_EMPTY_NEGATIVE = " "
# Parameters of ours that a caller sees, beside those that every base takes.
_OPTIONAL = (
    "negative_prompt", "strength", "true_cfg_scale", "guidance_rescale", "clip_skip", "max_sequence_length",
    "prompt_2", "sigmas", "timesteps",
)  # fmt: skip


def seeds_of(request: GenerationRequest) -> tuple[int, ...]:
    """Return the seed of each image of a request; they wrap round after the largest."""
    return tuple((request.seed + index) % (MAX_SEED + 1) for index in range(request.num_images))


def parameters_taken(pipeline: Any, family: Family) -> tuple[str, ...]:
    """Return the optional parameters of a request that a pipeline takes, sorted."""
    known = parameters_of(pipeline)
    hidden = {"true_cfg_scale"} if not family.has_own_true_cfg else set[str]()
    return tuple(sorted(name for name in _OPTIONAL if name in known and name not in hidden))


def check_parameters(request: GenerationRequest, pipeline: Any, family: Family) -> None:
    """Refuse what a pipeline has no parameter for, and values that its family cannot draw.

    Raises:
        MalformedRequest: a parameter that the pipeline does not take.
        OutOfBounds: sides that are no multiple of the family's, too few steps, or more layers skipped than there are.
    """
    given = set(request.options.given())
    if request.negative_prompt is not None:
        given.add("negative_prompt")
    taken = parameters_taken(pipeline, family)
    for name in sorted(given - set(taken)):
        takes = f"it takes {', '.join(taken)}" if taken else "it takes none beside those of every base"
        raise MalformedRequest(f"{request.base_id} takes no '{name}' for such a request; {takes}")
    for name, side in (("width", request.width), ("height", request.height)):
        if side % family.side_multiple:
            raise OutOfBounds(name, side, f"a multiple of {family.side_multiple} for {request.base_id}")
    for picture in _given_pictures(request) if reads_references(request, family) else ():
        if max(picture.width, picture.height) > family.max_aspect_ratio * min(picture.width, picture.height):
            asked = f"at most {family.max_aspect_ratio:g} times as long as wide for {request.base_id}"
            raise OutOfBounds("image", f"{picture.width}x{picture.height}", asked)
    clip_skip = request.options.clip_skip
    if clip_skip is not None and clip_skip >= (depth := _fewest_layers(pipeline)):
        raise OutOfBounds("clip_skip", clip_skip, f"below the {depth} layers of a text encoder of {request.base_id}")
    if request.steps < family.min_steps:
        raise OutOfBounds("num_inference_steps", request.steps, f"at least {family.min_steps} for {request.base_id}")


def _fewest_layers(pipeline: Any) -> int:
    encoders: tuple[Any, ...] = text_encoders_of(pipeline)
    return min(encoder.config.num_hidden_layers for encoder in encoders)


def arguments_of(
    requests: Sequence[GenerationRequest], pipeline: Any, family: Family, *, strength: float
) -> dict[str, Any]:
    """Return the keyword arguments of the call: one generator and picture for each image."""
    head, known = requests[0], parameters_of(pipeline)
    rows = [request for request in requests for _ in range(request.num_images)]
    texts = [(row.prompt, row.negative_prompt) for row in rows]
    if head.image is None and len(set(texts)) == 1:
        texts = texts[:1]  # encoded once, for all images of the pass
    seeds = [seed for request in requests for seed in seeds_of(request)]
    wanted: dict[str, Any] = {
        "num_images_per_prompt": len(rows) // len(texts),
        **dict.fromkeys(family.guidance, head.guidance_scale),
        **family.fixed,
        **(dict.fromkeys(family.two_step_arguments) if head.steps != 2 else {}),
        **_size(head, family),
        **head.options.given(),
        # One for each prompt: some pipelines repeat neither.
        **({"prompt_2": [head.options.prompt_2] * len(texts)} if head.options.prompt_2 is not None else {}),
    }
    return {
        "prompt": [family.worded(prompt) for prompt, _ in texts],
        "num_inference_steps": head.steps,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": "pt",
        **{name: value for name, value in wanted.items() if name in known},
        **_negatives(head, texts, family),
        **(_pictures(requests, family, strength if "strength" in known else None) if head.image is not None else {}),
    }


def set_area(request: GenerationRequest, pipeline: Any, family: Family) -> None:
    """Tell a pipeline that draws sizes of its own which one is asked for."""
    if family.area_parameter == "resolutions":
        pipeline.resolutions = [(request.width, request.height)]
    if family.area_parameter == "default_sample_size":
        # It multiplies the sides by the root of a quotient and rounds down: a breath more keeps them whole.
        side = (request.width * request.height) ** 0.5 / pipeline.vae_scale_factor
        pipeline.default_sample_size = side * (1 + 1e-9)


def reads_references(request: GenerationRequest, family: Family) -> bool:
    """Say whether the pipeline of a request with a picture takes several."""
    return family.takes_references and request.mask is None


def _given_pictures(request: GenerationRequest) -> tuple[PixelImage, ...]:
    return (request.image, *request.references) if request.image is not None else ()


def _size(request: GenerationRequest, family: Family) -> dict[str, int]:
    size = {"width": request.width, "height": request.height}
    return size | {"max_area": request.width * request.height} if family.area_parameter == "max_area" else size


def _negatives(head: GenerationRequest, texts: Sequence[tuple[str, str | None]], family: Family) -> dict[str, Any]:
    if head.negative_prompt is not None:
        return {"negative_prompt": [negative for _, negative in texts]}
    # These guide only where there is a negative prompt.
    if "true_cfg_scale" in family.guidance and head.guidance_scale > family.guided_above:
        return {"negative_prompt": [_EMPTY_NEGATIVE] * len(texts)}
    return {}


def _pictures(requests: Sequence[GenerationRequest], family: Family, strength: float | None) -> dict[str, Any]:
    if reads_references(requests[0], family):  # of the one image of the pass
        return {"image": [as_reference(one) for one in _given_pictures(requests[0])]}
    found: dict[str, Any] = {"image": [fitted(one) for one in requests for _ in range(one.num_images)]}
    if strength is not None:
        found["strength"] = strength
    if requests[0].mask is not None:
        found["mask_image"] = [fitted_mask(one) for one in requests for _ in range(one.num_images)]
    return found


def parameters_without_effect(request: GenerationRequest, family: Family, default_guidance: float) -> list[str]:
    """Say of each parameter that a request sets and that changes nothing why it does not."""
    has_negative = request.negative_prompt is not None
    true_cfg = request.options.true_cfg_scale
    found: list[str] = []
    if has_negative and not family.is_guided(request.guidance_scale, true_cfg, has_negative_prompt=True):
        needs = "true_cfg_scale over 1" if family.has_own_true_cfg else f"guidance_scale over {family.guided_above:g}"
        found.append(f"negative_prompt changes nothing without {needs}")
    if true_cfg is not None and true_cfg > 1 and not has_negative:
        found.append("true_cfg_scale changes nothing without a negative_prompt")
    if request.references and not reads_references(request, family):
        why = "there is a mask" if family.takes_references else f"{request.base_id} takes one"
        found.append(f"only the first of {1 + len(request.references)} pictures is used, since {why}")
    if not family.reads_guidance and request.guidance_scale != default_guidance:
        found.append(f"guidance_scale changes nothing on {request.base_id}, which is distilled")
    return found
