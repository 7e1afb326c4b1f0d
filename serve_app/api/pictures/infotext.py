"""The settings of an image in its PNG: the text that A1111 writes as `parameters`, and other tools read.

Owns its form. It names bases and adapters as the request did, and holds nothing else of who asked or where files lie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from serve_app.core import GenerationRequest, Scales

INFOTEXT = "parameters"


def infotext(request: GenerationRequest, *, seed: int, scheduler: str, digests: Sequence[str]) -> str:
    """Return the text of one image; `digests` are those of the request's adapters, in its order.

    `Lora hashes` is as A1111 has it. `Adapters` is ours, as a request's `loras`, each with the digest of its file;
    `Options` are the further fields of the request, such as `shift`.
    """
    adapters = [
        {"id": use.name or use.spec.id, "scale": _scale(use.scale), "digest": digest}
        for use, digest in zip(request.adapters, digests, strict=True)
    ]
    options = dict(request.scheduler_options) | request.options.given()
    # A1111 counts the last layer.
    clip_skip = None if request.options.clip_skip is None else request.options.clip_skip + 1
    options.pop("clip_skip", None)
    told: Mapping[str, object] = {
        "Steps": request.steps,
        "Sampler": scheduler,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": request.base_id,
        "Denoising strength": None if request.strength is None else f"{request.strength:g}",
        "Clip skip": clip_skip,
        "Lora hashes": ", ".join(f"{one['id']}: {str(one['digest'])[:12]}" for one in adapters) or None,
        "Adapters": json.dumps(adapters) if adapters else None,
        "Options": json.dumps(options) if options else None,
        "Prompt syntax": None if request.prompt_syntax == "plain" else request.prompt_syntax,
        "Version": "Loraplex",
    }
    negative = [] if request.negative_prompt is None else [f"Negative prompt: {request.negative_prompt}"]
    last = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in told.items() if value is not None)
    return "\n".join([request.prompt, *negative, last])


def _scale(scale: float | Scales) -> float | dict[str, float]:
    if isinstance(scale, Scales):
        return {"denoiser": scale.denoiser, "text_encoder": scale.text_encoder}
    return scale


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
