"""Between the engine's tensors and the pixels that cross process boundaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from serve_app.core import GenerationRequest, PixelImage
from serve_app.errors import InternalError, LoraplexError, NonFinite


def fitted(request: GenerationRequest) -> Image.Image:
    """Return a request's input picture at the request's size."""
    source = request.image
    assert source is not None
    picture = Image.frombytes("RGB", (source.width, source.height), source.pixels)
    size = (request.width, request.height)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def are_finite(tensor: Tensor) -> Tensor:
    """Return, for each image of a batch [n, ...], whether it holds neither NaN nor infinity: [n], bool."""
    return torch.isfinite(tensor).flatten(1).all(dim=1)


def pixel_images(images: Tensor) -> list[PixelImage]:
    """Turn [n, 3, height, width] in 0..1 into pixels, rounding half to even as diffusers does for its pictures."""
    eight_bits = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    height, width = eight_bits.shape[1:3]
    return [PixelImage(width, height, image.numpy().tobytes()) for image in eight_bits]


def share_out(
    requests: Sequence[GenerationRequest], images: Sequence[PixelImage], are_sound: Sequence[bool]
) -> tuple[tuple[PixelImage, ...] | LoraplexError, ...]:
    """Give each request its images, or an error where one of them is not finite: never a black picture."""
    shares: list[tuple[PixelImage, ...] | LoraplexError] = []
    start = 0
    for request in requests:
        end = start + request.num_images
        shares.append(tuple(images[start:end]) if all(are_sound[start:end]) else _unsound(request))
        start = end
    return tuple(shares)


def _unsound(request: GenerationRequest) -> LoraplexError:
    if not request.adapters:
        return InternalError(request.request_id)
    names = " with ".join(f"{use.spec.id} at scale {use.scale:g}" for use in request.adapters)
    return NonFinite(names, "the image overflows; a smaller scale or other steps may help")
