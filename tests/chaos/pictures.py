"""What the callers of the chaos run ask for: a fixed set of pictures, so that each has a reference made beforehand.

Owns a picture's parameters and how each wire shape says them. Must not know who answers.
"""

from __future__ import annotations

import base64
import io
import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tests.service import BASES, STYLES

# Width, height, steps and scale; an adapter at another scale is another composition on the replica.
FORMS = ((32, 32, 3, 1.0), (48, 32, 2, 0.6), (32, 64, 4, 1.0), (64, 64, 2, 0.3))
PROMPTS = ("a red circle on a blue background", "a green square on a white background")
INPUT_SIDE = 32
# How many of a hundred pictures: changed from another picture; two at once.
EDITS, PAIRS = 12, 15


@dataclass(frozen=True, slots=True)
class Picture:
    """All that decides what an image looks like, `count` images with seeds one after another."""

    base: str
    style: str | None
    scale: float
    width: int
    height: int
    steps: int
    seed: int
    prompt: str
    count: int
    is_edit: bool

    @property
    def adapter(self) -> str | None:
        """The embedded adapter."""
        return f"{self.base}-{self.style}" if self.style else None


def all_pictures(seed: int) -> list[Picture]:
    """Return every picture of a run: each base without and with each of its adapters, in each form."""
    rng = random.Random(seed)
    return [
        Picture(
            base=base,
            style=style,
            scale=scale,
            width=width,
            height=height,
            steps=steps,
            seed=rng.randrange(2**32),
            prompt=rng.choice(PROMPTS),
            count=2 if rng.randrange(100) < PAIRS else 1,
            is_edit=rng.randrange(100) < EDITS,
        )
        for base, style, (width, height, steps, scale) in itertools.product(BASES, (None, *STYLES), FORMS)
    ]


def inference_body(picture: Picture, adapter: str | None) -> dict[str, Any]:
    """Return the Hugging Face shape of a picture, with the adapter under the id that is asked for."""
    parameters: dict[str, Any] = {
        "width": picture.width,
        "height": picture.height,
        "num_inference_steps": picture.steps,
        "seed": picture.seed,
    }
    if adapter is not None:
        parameters["loras"] = [{"id": adapter, "scale": picture.scale}]
    body: dict[str, Any] = {"inputs": picture.prompt, "parameters": parameters}
    return body | {"image": base64.b64encode(input_png()).decode()} if picture.is_edit else body


def generation_body(picture: Picture, adapter: str | None, *, is_stream: bool) -> dict[str, Any]:
    """Return the OpenAI shape of a picture, with the adapter under the id that is asked for."""
    body: dict[str, Any] = {
        "model": picture.base,
        "prompt": picture.prompt,
        "size": f"{picture.width}x{picture.height}",
        "num_inference_steps": picture.steps,
        "seed": picture.seed,
        "n": picture.count,
    }
    if adapter is not None:
        body["loras"] = [{"id": adapter, "scale": picture.scale}]
    return body | ({"stream": True, "partial_images": 1} if is_stream else {})


def input_png() -> bytes:
    """Return the picture that edits begin with."""
    ramp = np.linspace(0, 255, INPUT_SIDE, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
