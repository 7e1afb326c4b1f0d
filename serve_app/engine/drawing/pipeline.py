"""One base model as a function: requests in, pixels out.

Owns the loaded pipelines, what a request may ask of them, and one pass over the device. Must not know
adapters' weights, queues or threads: whoever calls sees to it that one thread at a time does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, PixelImage
from serve_app.engine.base.loading import HubAccess, LoadedBase, ResolvedSource, default_device, load_base
from serve_app.engine.base.manifest import BaseManifest, adaptable_components, manifest_of
from serve_app.engine.base.schedulers import NoiseSchedulers
from serve_app.engine.base.task_pipelines import takes_size, variants_of
from serve_app.engine.drawing.pixels import are_finite, fitted, fitted_mask, pixel_images, share_out
from serve_app.engine.drawing.preview import LatentColours, OnPreview, Previewer, fit_latent_colours
from serve_app.engine.drawing.steps import OnStep, StepCallback
from serve_app.engine.drawing.texts import encode_individually, text_encoders_of
from serve_app.engine.drawing.vocabularies import TextualInversion
from serve_app.errors import LoraplexError, OutOfBounds

MAX_SEED = 2**64 - 1
_UNBOUNDED_TOKENS = 1_000_000  # tokenizers without a window of their own say some huge number


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """What one pass made: for each request in order its images, or the error that befell it alone; and warnings."""

    images: tuple[tuple[PixelImage, ...] | LoraplexError, ...]
    warnings: tuple[tuple[str, ...], ...]
    denoise_ms: float
    decode_ms: float


def seeds_of(request: GenerationRequest) -> tuple[int, ...]:
    """Return the seed of each image of a request; they wrap round after the largest."""
    return tuple((request.seed + index) % (MAX_SEED + 1) for index in range(request.num_images))


class BasePipeline:
    """A base on its device: text-to-image, image-to-image and inpainting over the very same modules.

    A call leaves nothing behind: each has its own scheduler and generators, and the modules are as they were,
    be it finished, cancelled or failed. The same requests in the same pass give the same bits, and those of
    the plain diffusers call.
    """

    def __init__(self, config: BaseModelConfig, loaded: LoadedBase) -> None:
        """Take over a loaded pipeline.

        Raises:
            BaseUnusable: a configured noise scheduler does not fit the base.
        """
        self._config = config
        self._variants = variants_of(loaded.pipeline)
        self._schedulers = NoiseSchedulers(config, loaded.pipeline.scheduler)
        self._idle_scheduler = loaded.pipeline.scheduler
        self._text_encoders = text_encoders_of(loaded.pipeline)
        self._vae_dtype: torch.dtype = loaded.pipeline.vae.dtype
        self._vocabularies = TextualInversion(loaded.pipeline)
        self._tokenizer_name = _widest_tokenizer(loaded.pipeline)
        self.device: torch.device = loaded.pipeline.device
        self._latent_colours: LatentColours | None = None
        self.manifest: BaseManifest = manifest_of(loaded.pipeline)

    @classmethod
    def load(
        cls,
        config: BaseModelConfig,
        source: ResolvedSource,
        *,
        vae_source: ResolvedSource | None = None,
        device: torch.device | None = None,
        hub: HubAccess | None = None,
    ) -> BasePipeline:
        """Load a base onto `device`, by default the GPU where there is one; the rest is `load_base`'s.

        Raises:
            BaseUnusable: it cannot be loaded as configured.
            HubUnavailable: its files are not all at hand and the Hub does not answer.
        """
        device, hub = device or default_device(), hub or HubAccess()
        return cls(config, load_base(config, source, vae_source, device=device, hub=hub))

    @property
    def base_id(self) -> str:
        """The base's public id."""
        return self._config.id

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The modules that adapters may change, by component name."""
        return adaptable_components(self._variants.text_to_image)

    @property
    def default_pixels(self) -> int:
        """The pixels of an image where a request says nothing of its size."""
        return self._config.defaults.width * self._config.defaults.height

    @property
    def device_name(self) -> str:
        """What the images are computed on: "cpu", or the GPU's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def schedulers(self) -> tuple[str, ...]:
        """Return the names of the noise schedulers that a request may choose from."""
        return self._schedulers.supported_names()

    def check(self, request: GenerationRequest) -> None:
        """Refuse what this base cannot do, without touching the device; safe in any thread.

        Raises:
            UnknownScheduler: the base does not offer the scheduler.
            OutOfBounds: the seed is no 64-bit number, or scheduler or strength cannot do with so few steps.
            MalformedRequest: the base has no image-to-image, or no inpainting.
        """
        self._schedulers.check(request.scheduler, request.steps)
        if not 0 <= request.seed <= MAX_SEED:
            raise OutOfBounds("seed", request.seed, f"from 0 to {MAX_SEED}")
        self._variants.of(request)
        if request.image is None:
            return
        strength = self._strength(request)
        if int(request.steps * strength) < 1:
            raise OutOfBounds("strength", strength, f"at least 1/{request.steps} with {request.steps} steps")

    def with_ti_tokens(self, words: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the prompts of passes inside it name an adapter's words, rows by component; for the device thread."""
        variants = (self._variants.text_to_image, self._variants.image_to_image, self._variants.inpainting)
        return self._vocabularies.loaded(words, [pipeline for pipeline in variants if pipeline is not None])

    def truncation_warning(self, prompt: str, what: str = "prompt") -> str | None:
        """Say how many tokens of `prompt` the base reads, if not all; for the device thread only.

        Of several text encoders the one that reads the most decides.
        """
        tokenizer = getattr(self._variants.text_to_image, self._tokenizer_name)
        window: int = tokenizer.model_max_length
        # A token stands for one byte at least, so that short prompts need no counting.
        if window > _UNBOUNDED_TOKENS or (prompt.isascii() and len(prompt) + 2 <= window):
            return None
        tokens = tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids
        return f"{what} truncated to {window} tokens" if len(tokens) > window else None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_step: OnStep | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        on_preview: OnPreview | None = None,
    ) -> PassOutcome:
        """Run requests that share a batch key in one pass; each has passed `check`.

        `on_step` hears (passes of the denoiser done, passes in all) after each; `on_preview` the previews that are
        due. All three callables run in this thread.

        Raises:
            GenerationCancelled: `is_cancelled` said so after a step.
        """
        pipeline: Any = self._variants.of(requests[0])
        arguments = self._arguments(pipeline, requests)
        scheduler = self._schedulers.fresh(requests[0].scheduler)
        watch = StepCallback(on_step, is_cancelled, self._previewer(requests, scheduler, on_preview))
        started = time.perf_counter()
        try:
            pipeline.scheduler = scheduler
            with encode_individually(self._text_encoders):
                output = pipeline(**arguments, callback_on_step_end=watch)
            are_sound: list[bool] = (watch.is_finite & are_finite(output.images).cpu()).tolist()
            images = pixel_images(output.images)
        except BaseException:
            # SDXL decodes in float32 and goes back afterwards, unless decoding fails.
            pipeline.vae.to(dtype=self._vae_dtype)
            raise
        finally:
            pipeline.scheduler = self._idle_scheduler
        ended = time.perf_counter()
        blacked_out = getattr(output, "nsfw_content_detected", None) or [False] * len(images)
        return PassOutcome(
            images=share_out(requests, images, are_sound, blacked_out),
            warnings=self._warnings(requests, blacked_out),
            denoise_ms=(watch.denoised_at - started) * 1e3,
            decode_ms=(ended - watch.denoised_at) * 1e3,
        )

    def restore_dtypes(self) -> None:
        """Undo what a pass that failed for want of memory may have left: a decoder between two dtypes."""
        vae: Any = self._variants.text_to_image.vae
        vae.to(dtype=self._vae_dtype)

    def _previewer(
        self, requests: Sequence[GenerationRequest], scheduler: Any, on_preview: OnPreview | None
    ) -> Previewer | None:
        if on_preview is None or not any(request.num_previews for request in requests):
            return None
        if self._latent_colours is None:
            self._latent_colours = fit_latent_colours(self._variants.text_to_image.vae)
        return Previewer(requests, self._latent_colours, scheduler, on_preview)

    def _arguments(self, pipeline: Any, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
        """Return the keyword arguments of the pipeline call: one generator and picture for each image."""
        head = requests[0]
        rows = [request for request in requests for _ in range(request.num_images)]
        seeds = [seed for request in requests for seed in seeds_of(request)]
        texts = [(row.prompt, row.negative_prompt) for row in rows]
        if head.image is None and len(set(texts)) == 1:
            texts = texts[:1]  # encoded once, for all images of the pass
        arguments: dict[str, Any] = {
            "prompt": [prompt for prompt, _ in texts],
            "num_images_per_prompt": len(rows) // len(texts),
            "num_inference_steps": head.steps,
            "guidance_scale": head.guidance_scale,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "output_type": "pt",
        }
        if head.negative_prompt is not None:
            arguments["negative_prompt"] = [negative for _, negative in texts]
        if head.image is None or takes_size(pipeline):
            arguments |= {"width": head.width, "height": head.height}
        if head.image is None:
            return arguments
        arguments["image"] = [picture for request in requests for picture in [fitted(request)] * request.num_images]
        arguments["strength"] = self._strength(head)
        if head.mask is not None:
            arguments["mask_image"] = [
                mask for request in requests for mask in [fitted_mask(request)] * request.num_images
            ]
        return arguments

    def _strength(self, request: GenerationRequest) -> float:
        return self._config.defaults.strength if request.strength is None else request.strength

    def _warnings(
        self, requests: Sequence[GenerationRequest], blacked_out: Sequence[bool]
    ) -> tuple[tuple[str, ...], ...]:
        flags = iter(blacked_out)
        found: list[tuple[str, ...]] = []
        for request in requests:
            lines = [self.truncation_warning(request.prompt)]
            if request.negative_prompt is not None:
                lines.append(self.truncation_warning(request.negative_prompt, "negative prompt"))
            if any(list(itertools.islice(flags, request.num_images))):
                lines.append("the base's safety checker blacked out an image")
            found.append(tuple(line for line in lines if line is not None))
        return tuple(found)


def _widest_tokenizer(pipeline: Any) -> str:
    """Name the tokenizer that reads the longest prompt; the first of those that read alike."""
    components: dict[str, Any] = pipeline.components
    found = [name for name, part in components.items() if name.startswith("tokenizer") and part is not None]
    return max(found, key=lambda name: components[name].model_max_length)
