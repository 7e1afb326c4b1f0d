"""Previews: what the images of a pass will look like, from its latents alone.

Owns the map from latents to colours, which is linear and fitted to the base's own encoder, so that no second decoder
runs; and the estimate of the finished latents between two steps. Must not know jobs or callers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from serve_app.core import GenerationRequest, PixelImage
from serve_app.engine.drawing.pixels import pixel_images
from serve_app.families.family import LatentLayout

# Hears, for each request of the pass in order, its previews after a step: none where none is due.
OnPreview = Callable[[Sequence[tuple[PixelImage, ...]]], None]

_SWATCH_SIDE_PX = 64
_SWATCH_CELLS = (2, 3, 4, 6)
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class LatentColours:
    """A linear map from latents to colours: `weight` [channels, 3] and `bias` [3], in float32 on the device."""

    weight: Tensor
    bias: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """Turn latents [n, channels, h, w] into colours [n, 3, h, w] in 0..1."""
        colours = torch.einsum("nchw,cr->nrhw", latents.float(), self.weight) + self.bias.view(1, 3, 1, 1)
        return colours.nan_to_num().clamp(0, 1)

    def fits(self, latents: Tensor) -> bool:
        """Whether latents have the shape that the map is for; some families pack theirs."""
        return latents.ndim == 4 and latents.shape[1] == self.weight.shape[0]


@torch.no_grad()
def fit_latent_colours(vae: Any) -> LatentColours:
    """Fit the map by least squares on colour fields that the base's encoder has seen: one pass of 8 small pictures.

    Draws no random number that a request could notice. An encoder that overflows in half precision is run in single.
    """
    swatches = _swatches()
    dtype: torch.dtype = vae.dtype
    is_raised = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    try:
        if is_raised:
            vae.to(dtype=torch.float32)
        pictures = swatches.to(vae.device, vae.dtype) * 2 - 1
        encoded = vae.encode(pictures[:, :, None] if _takes_frames(vae) else pictures)
    finally:
        if is_raised:
            vae.to(dtype=dtype)
    found: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    latents = normalized_latents(vae, _pictures(found.float().cpu()))
    colours = functional.interpolate(swatches, size=latents.shape[-2:], mode="area")
    inputs = latents.permute(0, 2, 3, 1).flatten(0, 2)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs.double(), colours.permute(0, 2, 3, 1).flatten(0, 2).double(), driver="gelsd")
    fitted = solution.solution.float().to(vae.device)
    return LatentColours(fitted[:-1], fitted[-1])


def _takes_frames(vae: Any) -> bool:
    """Say whether a VAE is one of videos: its pictures and latents have one more dimension, of one frame."""
    return hasattr(vae.config, "temperal_downsample")


def _pictures(latents: Tensor) -> Tensor:
    """Return latents [n, channels, h, w] of which some have a dimension of one frame."""
    return latents[:, :, 0] if latents.ndim == 5 else latents


def normalized_latents(vae: Any, latents: Tensor) -> Tensor:
    """Return what a VAE encoded, [n, channels, h, w], as its denoiser has it: one of three ways, by its configuration.

    The formulas are those of the `_encode_vae_image` of diffusers' pipelines.
    """
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:  # Qwen-Image: channel by channel
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return (latents - mean) / std
    if hasattr(vae, "bn"):  # FLUX.2: 2x2 patches, by the statistics of a batch norm
        latents = functional.pixel_unshuffle(latents, 2)
        mean, variance = (
            values.float().cpu().view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var)
        )
        return (latents - mean) / (variance + config.batch_norm_eps) ** 0.5
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def unpacked_latents(latents: Tensor, layout: LatentLayout, width: int, height: int) -> Tensor:
    """Return latents as pictures [n, channels, h, w]; those of tokens [n, tokens, channels] lie row by row."""
    latents = latents[:, 0].permute(0, 3, 1, 2) if layout == "channels last" else _pictures(latents)
    if latents.ndim != 3:
        return functional.pixel_unshuffle(latents, 2) if layout == "unpatched" else latents
    rows = round((latents.shape[1] * height / width) ** 0.5)
    grid = latents.transpose(1, 2).unflatten(2, (rows, latents.shape[1] // rows))
    if layout == "packed":
        return functional.pixel_shuffle(grid, 2)
    return grid.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2) if layout == "patched channels last" else grid


def _swatches() -> Tensor:
    """Return colour fields [8, 3, side, side] in 0..1, smooth ones and ones with edges."""
    generator = torch.Generator().manual_seed(_SEED)
    fields: list[Tensor] = []
    for cells in _SWATCH_CELLS:
        for mode in ("bicubic", "nearest"):
            colours = torch.rand(1, 3, cells, cells, generator=generator)
            fields.append(functional.interpolate(colours, size=(_SWATCH_SIDE_PX, _SWATCH_SIDE_PX), mode=mode))
    return torch.cat(fields).clamp(0, 1)


def preview_steps(steps: int, count: int) -> frozenset[int]:
    """Return after which of `steps` steps previews are due: `count` of them spread evenly, none after the last."""
    spread = {round(steps * index / (count + 1)) for index in range(1, count + 1)}
    return frozenset(spread - {0, steps})


class Previewer:
    """Takes the previews of one pass, which has `scheduler` to itself.

    Between two steps the latents are still mostly noise, so what is shown is where the scheduler's last step was
    heading: the latents that the denoiser takes for the finished ones.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        colours: LatentColours,
        scheduler: Any,
        tell: OnPreview,
        layout: LatentLayout = "picture",
    ) -> None:
        self._layout: LatentLayout = layout
        self._requests = requests
        self._colours = colours
        self._scheduler = scheduler
        self._tell = tell
        self._last: tuple[Tensor, Any, Tensor] | None = None
        step = scheduler.step

        # Pipelines look at the signature to learn what the scheduler takes: `wraps` keeps it.
        @functools.wraps(step)
        def noted(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._last = (model_output, timestep, sample.clone())  # some pipelines write the next one into it
            return step(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = noted

    def after(self, step: int, steps: int) -> None:
        """Take the previews that are due after `step` of `steps`, if any."""
        due = [step in preview_steps(steps, request.num_previews) for request in self._requests]
        if not any(due) or self._last is None:
            return
        head = self._requests[0]
        latents = estimate_finished(self._scheduler, *self._last)
        latents = unpacked_latents(latents, self._layout, head.width, head.height)
        if not self._colours.fits(latents):
            return
        images = iter(pixel_images(self._colours(latents)))
        shares = [tuple(next(images) for _ in range(request.num_images)) for request in self._requests]
        self._tell([share if is_due else () for share, is_due in zip(shares, due, strict=True)])


def estimate_finished(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """Return the finished latents as one output of the denoiser predicts them.

    The formulas are those of Karras et al. 2022 (table 1) and, for "v", of Salimans and Ho 2022 (appendix D).
    """
    kind = getattr(scheduler.config, "prediction_type", None)
    if kind == "sample":
        return model_output
    time = float(timestep)
    if kind in (None, "flow_prediction"):
        return sample - time / scheduler.config.num_train_timesteps * model_output
    kept = float(scheduler.alphas_cumprod[round(time)])
    # Schedulers that start at a variance over 1 add the noise without shrinking the picture.
    scaled = sample * kept**0.5 if float(scheduler.init_noise_sigma) > 1.001 else sample
    if kind == "v_prediction":
        return scaled * kept**0.5 - model_output * (1 - kept) ** 0.5
    return (scaled - model_output * (1 - kept) ** 0.5) / kept**0.5
