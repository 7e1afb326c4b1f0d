"""Between the engine's tensors and the pixels that cross process boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from PIL import Image
from torch import Tensor

from serve_app.core import GenerationRequest, PixelImage
from serve_app.errors import InternalError, LoraplexError
from serve_app.refusals import NonFinite

# Pipelines refuse smaller pictures.
MIN_REFERENCE_SIDE = 64


def as_picture(image: PixelImage) -> Image.Image:
    """Return pixels as pipelines take them."""
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)


def as_reference(image: PixelImage) -> Image.Image:
    """Return a picture in its own proportions, enlarged where a pipeline would find it too small."""
    picture, times = as_picture(image), MIN_REFERENCE_SIDE / min(image.width, image.height)
    if times <= 1:
        return picture
    return picture.resize((ceil(image.width * times), ceil(image.height * times)), Image.Resampling.LANCZOS)


def fitted(request: GenerationRequest) -> Image.Image:
    """Return a request's input picture at the request's size."""
    assert request.image is not None
    picture = as_picture(request.image)
    size = (request.width, request.height)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def fitted_mask(request: GenerationRequest) -> Image.Image:
    """Return a request's mask at the request's size: 255 where the picture is redrawn, 0 where it is kept."""
    source = request.mask
    assert source is not None
    mask = Image.frombytes("L", (source.width, source.height), source.values)
    size = (request.width, request.height)
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.BILINEAR)
    # The pipelines halve it in the same way: a pixel that is half masked is redrawn.
    return mask.point([0] * 128 + [255] * 128)


def with_kept_pixels(request: GenerationRequest, image: PixelImage) -> PixelImage:
    """Return a drawn image with every pixel that the mask keeps as it was given: decoding changes them a little."""
    if request.mask is None:
        return image
    composed = Image.composite(as_picture(image), fitted(request), fitted_mask(request))
    return PixelImage(image.width, image.height, composed.tobytes())


def are_finite(tensor: Tensor) -> Tensor:
    """Return, for each image of a batch [n, ...], whether it holds neither NaN nor infinity: [n], bool."""
    return torch.isfinite(tensor).flatten(1).all(dim=1)


def pixel_images(images: Tensor) -> list[PixelImage]:
    """Turn [n, 3, height, width] in 0..1 into pixels, rounding half to even as diffusers does for its pictures."""
    eight_bits = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    height, width = eight_bits.shape[1:3]
    return [PixelImage(width, height, image.numpy().tobytes()) for image in eight_bits]


def share_out(
    requests: Sequence[GenerationRequest],
    images: Sequence[PixelImage],
    are_sound: Sequence[bool],
    are_censored: Sequence[bool],
) -> tuple[tuple[PixelImage, ...] | LoraplexError, ...]:
    """Give each request its images, or an error where one of them is not finite or came out black.

    Images that a safety checker blacked out (`are_censored`) stay as they are.
    """
    shares: list[tuple[PixelImage, ...] | LoraplexError] = []
    start = 0
    for request in requests:
        end = start + request.num_images
        drawn = images[start:end]
        if not all(are_sound[start:end]):
            shares.append(_unsound(request, "the image overflows"))
        elif any(_is_lost(request, *pair) for pair in zip(drawn, are_censored[start:end], strict=True)):
            shares.append(_unsound(request, "the image came out all black, as it does where values overflow"))
        else:
            shares.append(tuple(with_kept_pixels(request, image) for image in drawn))
        start = end
    return tuple(shares)


def _is_lost(request: GenerationRequest, image: PixelImage, is_censored: bool) -> bool:
    """Return whether the image is black because of a numeric overflow.

    A base never produces an all-zero image by itself; an input image may be black.
    """
    if is_censored or not request.adapters or request.image is not None:
        return False
    return image.pixels.count(0) == len(image.pixels)


def _unsound(request: GenerationRequest, what: str) -> LoraplexError:
    if not request.adapters:
        return InternalError(request.request_id)
    names = " with ".join(f"{use.spec.id} at scale {use.scale:g}" for use in request.adapters)
    return NonFinite(names, f"{what}; a smaller scale or other steps may help")
