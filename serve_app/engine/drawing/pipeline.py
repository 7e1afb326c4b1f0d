"""One base model as a function: requests in, pixels out.

Owns the loaded pipelines, what a request may ask of them, and one pass over the device. Must not know
adapters' weights, queues or threads: callers must use it from one thread at a time.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, PixelImage
from serve_app.engine.base.fetching import HubAccess, ResolvedSource
from serve_app.engine.base.loading import LoadedBase, default_device, load_base
from serve_app.engine.base.manifest import BaseManifest, adaptable_components, manifest_of
from serve_app.engine.base.schedulers import NoiseSchedulers
from serve_app.engine.base.task_pipelines import parameters_of, variants_of
from serve_app.engine.drawing.arguments import (
    MAX_SEED,
    arguments_of,
    check_parameters,
    parameters_taken,
    parameters_without_effect,
    set_area,
)
from serve_app.engine.drawing.pixels import are_finite, pixel_images, share_out
from serve_app.engine.drawing.preview import LatentColours, OnPreview, Previewer, fit_latent_colours
from serve_app.engine.drawing.steps import BetweenSteps, OnStep, StepCallback
from serve_app.engine.drawing.texts import encode_individually, text_encoders_of
from serve_app.engine.drawing.vocabularies import TextualInversion
from serve_app.engine.drawing.weighted_prompts import ChunkCounter, reads_chunks, with_embeddings
from serve_app.errors import LoraplexError, OutOfBounds, PipelineRefused
from serve_app.families.abilities import BaseAbilities
from serve_app.families.family import Family, Task
from serve_app.prompt_syntax import SYNTAXES, check_taken

log = logging.getLogger(__name__)

_UNBOUNDED_TOKENS = 1_000_000  # tokenizers without a window of their own say some huge number


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """The result of one pass: for each request in order its images, or its own error; and warnings."""

    images: tuple[tuple[PixelImage, ...] | LoraplexError, ...]
    warnings: tuple[tuple[str, ...], ...]
    denoise_ms: float
    decode_ms: float


class BasePipeline:
    """A base on its device: the pipelines of all its tasks over the very same modules.

    A call leaves nothing behind: each has its own pipeline object, scheduler and generators, and the modules are as
    they were, be it finished, cancelled or failed. The same requests in the same pass give the same bits, and those of
    the plain diffusers call. So calls may take turns between their steps, as long as the modules' weights are at each
    step those of the call.
    """

    def __init__(self, config: BaseModelConfig, loaded: LoadedBase) -> None:
        """Take over a loaded pipeline.

        Raises:
            BaseUnusable: a configured noise scheduler does not fit the base.
        """
        self._variants = variants_of(loaded.pipeline, loaded.card)
        self._config = config.with_defaults_of(self._variants.family)
        self._schedulers = NoiseSchedulers(config, loaded.pipeline.scheduler, self._variants.family)
        self._text_encoders = text_encoders_of(loaded.pipeline)
        self._vae_dtype: torch.dtype = loaded.pipeline.vae.dtype
        self._vocabularies = TextualInversion(loaded.pipeline)
        weighs_words = self.family.weighs_words and reads_chunks(self._text_encoders)
        self._chunks = ChunkCounter(loaded.pipeline) if weighs_words else None
        self._tokenizer_name = _widest_tokenizer(loaded.pipeline)
        self.device: torch.device = loaded.pipeline.device
        self.compiler = loaded.compiler
        self.read_from = loaded.read_from
        self._latent_colours: LatentColours | None = None
        self.manifest: BaseManifest = manifest_of(loaded.pipeline)

    @classmethod
    def load(
        cls,
        config: BaseModelConfig,
        source: ResolvedSource,
        *,
        parts: Mapping[str, ResolvedSource] | None = None,
        device: torch.device | None = None,
        hub: HubAccess | None = None,
    ) -> BasePipeline:
        """Load a base onto `device`, by default the GPU where there is one; the rest is `load_base`'s.

        Raises:
            BaseUnusable: it cannot be loaded as configured.
            HubUnavailable: its files are not all at hand and the Hub does not answer.
        """
        device, hub = device or default_device(), hub or HubAccess()
        return cls(config, load_base(config, source, parts or {}, device=device, hub=hub))

    @property
    def config(self) -> BaseModelConfig:
        """The configuration of the base, with its family's defaults where it gives none."""
        return self._config

    @property
    def base_id(self) -> str:
        """The base's public id."""
        return self._config.id

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The modules that adapters may change, by component name."""
        return adaptable_components(self._variants.whole)

    @property
    def family(self) -> Family:
        """The facts of this kind of base, as this base's own configuration has them."""
        return self._variants.family

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of the base."""
        return tuple(self._variants.by_task)

    @property
    def max_images_per_pass(self) -> int | None:
        """How many images may share a pass without changing one another; None for any number."""
        return None if self.family.shares_passes else 1

    @property
    def default_pixels(self) -> int:
        """The pixels of an image where a request says nothing of its size."""
        return self._config.defaults.width * self._config.defaults.height

    @property
    def device_name(self) -> str:
        """The device of the images: "cpu", or the GPU's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def schedulers(self) -> tuple[str, ...]:
        """Return the names of the noise schedulers that a request may choose from."""
        return self._schedulers.supported_names()

    @property
    def default_scheduler(self) -> str:
        """The name of the noise scheduler of a request that names none."""
        return self._config.scheduler or type(self._variants.whole.scheduler).__name__

    def parameters(self, task: Task) -> tuple[str, ...]:
        """Return the optional parameters that a request for a task may set."""
        return parameters_taken(self._variants.by_task[task], self.family)

    def abilities(self) -> BaseAbilities:
        """Return what requests may ask for."""
        family = self.family
        return BaseAbilities(
            pipeline=type(self._variants.whole).__name__,
            family=family.name,
            parameters={task: self.parameters(task) for task in self.tasks},
            schedulers=self.schedulers(),
            side_multiple=family.side_multiple,
            min_steps=family.min_steps,
            tokens=family.tokens or _window(_tokenizer(getattr(self._variants.whole, self._tokenizer_name))),
            previews=family.previews,
            references=family.takes_references and "edit" in self.tasks,
            defaults=self.config.defaults.model_dump(),
            prompt_syntaxes=SYNTAXES if self._chunks is not None else ("plain",),
            fuses_adapters=self.manifest.fuses,
        )

    def withdraw(self, task: Task) -> None:
        """Serve a task no more, because it was tried and failed; before anything else uses the pipeline."""
        self._variants = self._variants.without(task)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what this base cannot do, without touching the device; safe in any thread.

        Raises:
            UnknownScheduler: the base does not offer the scheduler.
            OutOfBounds: the seed is no 64-bit number, a side no multiple of the family's, or there are too few steps.
            MalformedRequest: the base has no pipeline for the request, or the pipeline no such parameter.
        """
        pipeline = self._variants.of(request)
        levels = {name: values for name, values in request.options.given().items() if name in ("sigmas", "timesteps")}
        redraws = self._variants.task_of(request) in ("image", "inpaint")
        self._schedulers.check(request.scheduler, request.steps, request.scheduler_options, levels, redraws=redraws)
        if not 0 <= request.seed <= MAX_SEED:
            raise OutOfBounds("seed", request.seed, f"from 0 to {MAX_SEED}")
        check_parameters(request, pipeline, self.family)
        check_taken(request.prompt_syntax, self.base_id, weighs_words=self._chunks is not None)
        if request.image is None or "strength" not in parameters_of(pipeline):
            return
        strength = self._strength(request)
        if int(request.steps * strength) < 1:
            raise OutOfBounds("strength", strength, f"at least 1/{request.steps} with {request.steps} steps")

    def count_chunks(self, request: GenerationRequest) -> int:
        """Return how many chunks the texts of a request take together, 0 for plain ones; safe in any thread.

        Raises:
            OutOfBounds: more than are read.
        """
        if self._chunks is None or request.prompt_syntax == "plain":
            return 0
        return self._chunks.count(request.prompt, request.negative_prompt, request.prompt_syntax)

    def with_ti_tokens(self, ti_tokens: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the prompts of passes begun in it name an adapter's words, rows by component; for the device thread."""
        return self._vocabularies.loaded(ti_tokens, self._variants.all)

    def truncation_warning(self, prompt: str, what: str = "prompt") -> str | None:
        """Say how many tokens of `prompt` the base reads, if not all; for the device thread only.

        Of several text encoders the one that reads the most decides.
        """
        tokenizer = _tokenizer(getattr(self._variants.whole, self._tokenizer_name))
        window = self.family.tokens or _window(tokenizer)
        # A token stands for one byte at least, so that short prompts need no counting.
        if window is None or (prompt.isascii() and len(prompt) + 2 <= window):
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
        between_steps: BetweenSteps | None = None,
        ti_tokens: Mapping[str, Tensor] | None = None,
    ) -> PassOutcome:
        """Run requests that share a batch key in one pass; each has passed `check`.

        `on_step` hears (passes of the denoiser done, passes in all) after each; `on_preview` the previews that are
        due. `between_steps` may let other passes of this thread go on before it returns. All callables run in this
        thread. `ti_tokens` are those of an adapter that prompts may name, rows by component.

        Raises:
            GenerationCancelled: `is_cancelled` said so after a step.
        """
        scheduler = self._schedulers.fresh(requests[0].scheduler, requests[0].scheduler_options)
        previewer = self._previewer(requests, scheduler, on_preview)
        started = time.perf_counter()
        try:
            with ExitStack() as encoding:
                encoding.enter_context(self.with_ti_tokens(ti_tokens or {}))
                encoding.enter_context(encode_individually(self._text_encoders))
                notes = [self._notes(request) for request in requests]
                pipeline = _own_view(self._variants.of(requests[0]), scheduler)

                def pause() -> None:
                    encoding.close()  # texts are encoded before the first step
                    if between_steps is not None:
                        between_steps()

                watch = StepCallback(on_step, is_cancelled, previewer, pause)
                output = pipeline(**self._arguments(requests, pipeline), callback_on_step_end=watch)
            drawn: Any = output[0]  # its name differs from family to family
            are_sound: list[bool] = (watch.is_finite & are_finite(drawn).cpu()).tolist()
            images = pixel_images(drawn)
        except BaseException as error:
            # SDXL decodes in float32 and goes back afterwards, unless decoding fails.
            self.restore_dtypes()
            if isinstance(error, (ValueError, TypeError, RecursionError)):  # the last of a prompt that is read as JSON
                log.exception("a request passed all checks and was refused by %s: a bug", self.base_id)
                raise PipelineRefused(self.base_id, _sentence(error)) from error
            raise
        ended = time.perf_counter()
        blacked_out = getattr(output, "nsfw_content_detected", None) or [False] * len(images)
        return PassOutcome(
            images=share_out(requests, images, are_sound, blacked_out),
            warnings=_warnings(requests, notes, blacked_out),
            denoise_ms=(watch.denoised_at - started - watch.paused_s) * 1e3,
            decode_ms=(ended - watch.denoised_at) * 1e3,
        )

    def restore_dtypes(self) -> None:
        """Undo what a pass that failed for want of memory may have left: a decoder between two dtypes."""
        vae: Any = self._variants.whole.vae
        vae.to(dtype=self._vae_dtype)

    def _previewer(
        self, requests: Sequence[GenerationRequest], scheduler: Any, on_preview: OnPreview | None
    ) -> Previewer | None:
        if on_preview is None or not self.family.previews or not any(one.num_previews for one in requests):
            return None
        if self._latent_colours is None:
            self._latent_colours = fit_latent_colours(self._variants.whole.vae)
        return Previewer(requests, self._latent_colours, scheduler, on_preview, self.family.latents)

    def _strength(self, request: GenerationRequest) -> float:
        return self._config.defaults.strength if request.strength is None else request.strength

    def _arguments(self, requests: Sequence[GenerationRequest], pipeline: Any) -> dict[str, Any]:
        head = requests[0]
        set_area(head, pipeline, self.family)
        arguments = arguments_of(requests, pipeline, self.family, strength=self._strength(head))
        if head.prompt_syntax == "plain":
            return arguments
        has_negative = head.negative_prompt is not None
        is_guided = self.family.is_guided(head.guidance_scale, None, has_negative_prompt=has_negative)
        return with_embeddings(pipeline, arguments, head.prompt_syntax, is_guided=is_guided)

    def _notes(self, request: GenerationRequest) -> list[str | None]:
        """Say what of a request has no effect, while its words are known."""
        lines: list[str | None] = [*self._without_effect(request)]
        if request.prompt_syntax != "plain":
            return lines  # all of a text is read
        lines.insert(0, self.truncation_warning(request.prompt))
        if request.negative_prompt is not None:
            lines.append(self.truncation_warning(request.negative_prompt, "negative prompt"))
        return lines

    def _without_effect(self, request: GenerationRequest) -> list[str]:
        """Name the parameters of a request that change nothing."""
        return parameters_without_effect(request, self.family, self._config.defaults.guidance_scale)


def _own_view(pipeline: Any, scheduler: Any) -> Any:
    """Return a pipeline over the same modules that keeps for itself what a call notes on its pipeline."""
    view = copy.copy(pipeline)
    view.scheduler = scheduler
    return view


def _warnings(
    requests: Sequence[GenerationRequest], notes: Sequence[Sequence[str | None]], blacked_out: Sequence[bool]
) -> tuple[tuple[str, ...], ...]:
    flags = iter(blacked_out)
    found: list[tuple[str, ...]] = []
    for request, lines in zip(requests, notes, strict=True):
        is_blacked_out = any(list(itertools.islice(flags, request.num_images)))
        censored = "the base's safety checker blacked out an image" if is_blacked_out else None
        found.append(tuple(line for line in (*lines, censored) if line is not None))
    return tuple(found)


def _window(tokenizer: Any) -> int | None:
    """Return how many tokens a tokenizer reads, None where it has no limit of its own."""
    window: int = tokenizer.model_max_length
    return None if window > _UNBOUNDED_TOKENS else window


def _sentence(error: BaseException) -> str:
    """Return the first line of what a pipeline says, without the names of its code."""
    lines = str(error).strip().splitlines() or ["it says no reason"]
    return lines[0].replace("`", "'")[:200]


def _tokenizer(part: Any) -> Any:
    """Return the tokenizer of a part that is one, or a processor with one."""
    return getattr(part, "tokenizer", part)


def _widest_tokenizer(pipeline: Any) -> str:
    """Name the tokenizer that reads the longest prompt; the first of those that read alike."""
    components: dict[str, Any] = pipeline.components
    found = [name for name, part in components.items() if name.startswith("tokenizer") and part is not None]
    found = found or ["processor"]  # some have theirs in it alone
    return max(found, key=lambda name: _tokenizer(components[name]).model_max_length)
