"""The values that pass between rooms and processes: adapters, requests, images.

Owns the immutable dataclasses that the HTTP layer, the ingress, the replicas and the engine exchange.
Must not know Ray, torch, HTTP or the file system.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Literal

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults

# Seeds are counted modulo this.
SEEDS = 2**64

# How a prompt is written: as it is read, or with weights and adapters in its text.
PromptSyntax = Literal["plain", "a1111", "comfyui"]

# A person waits for an interactive request, a program for a batch one.
Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Scales:
    """An adapter's scales, if they differ between the denoiser and the text encoders."""

    denoiser: float
    text_encoder: float

    def __format__(self, spec: str) -> str:
        """Return `denoiser/text encoder`, each number in the given format."""
        return f"{self.denoiser:{spec}}/{self.text_encoder:{spec}}"


# One number for all components, or one for each kind of component.
Scale = float | Scales
# The adapters of a request in their order of application: (digest of the file, scale) each.
AdapterSetKey = tuple[tuple[str, Scale], ...]


def scale_of(scale: Scale, component: str) -> float:
    """Return the scale of a pipeline component, such as `unet` or `text_encoder_2`."""
    if not isinstance(scale, Scales):
        return scale
    return scale.text_encoder if component.startswith("text_encoder") else scale.denoiser


@dataclass(frozen=True, slots=True)
class HubToken:
    """A caller's own Hub token; its repr does not show it."""

    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The parent span, as the two headers of W3C Trace Context."""

    traceparent: str
    tracestate: str = ""


# The value of an option of a noise scheduler; options come in pairs of name and value, sorted by name.
SchedulerOption = bool | float | str


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as a request names it, not resolved yet; a scale of None is the adapter's own, else 1.

    `defaults` are those of the alias by which it was named; they go before the adapter's own.
    """

    id: str
    scale: Scale | None = None
    revision: str | None = None
    filename: str | None = None
    defaults: AdapterDefaults = NO_DEFAULTS


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A resolved adapter: its base, its file, and the revision that fixes its bytes.

    `revision` is a commit hash of a Hub repository, or a content digest for a folder. `location` is the Hub
    repository id or the folder of the file and never reaches a client. `more_files` hold the rest of an adapter that
    lies in several; `size_bytes` is that of all. `embeddings` is the file with the adapter's textual-inversion tokens,
    `settings` the text of peft's `adapter_config.json`, which says how it is scaled.
    """

    id: str
    base_id: str
    revision: str
    filename: str
    origin: str
    location: str
    size_bytes: int
    embeddings: str | None = None
    settings: str | None = None
    more_files: tuple[str, ...] = ()
    defaults: AdapterDefaults = NO_DEFAULTS

    @property
    def key(self) -> str:
        """A name of these bytes, the same in every process; it does not contain the scale of a request."""
        name = f"{self.id}@{self.revision[:16]}/{self.filename}"
        beside = "\0".join((*self.more_files, *filter(None, (self.settings,))))
        return f"{name}+{sha256(beside.encode()).hexdigest()[:8]}" if beside else name

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold its layers."""
        return (self.filename, *self.more_files)


@dataclass(frozen=True, slots=True)
class ScaledAdapter:
    """A resolved adapter with the scale of one request, and the name by which that names it, such as an alias."""

    spec: AdapterSpec
    scale: Scale
    name: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PixelImage:
    """An uncompressed picture: `pixels` holds `height * width` RGB triples of 8 bits, row by row."""

    width: int
    height: int
    pixels: bytes = field(repr=False)


ImageFormat = Literal["jpeg", "png", "webp"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a reply's images are encoded; `quality` (0 to 100) applies to JPEG and WebP."""

    form: ImageFormat
    quality: int | None = None


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture in a file format."""

    width: int
    height: int
    encoding: Encoding
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PixelMask:
    """The part of an image to repaint: one byte per pixel, row by row, 255 to repaint and 0 to keep."""

    width: int
    height: int
    values: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class WallClockDeadline:
    """How long a request may take: until `at`, in seconds since 1970, `limit_s` after it arrived.

    `waits_for_start` is False where its caller does not wait for a base that has no replica yet.
    """

    at: float
    limit_s: float
    waits_for_start: bool = True


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Parameters that only some base families take, by the names that diffusers has for them; None for not asked."""

    true_cfg_scale: float | None = None
    guidance_rescale: float | None = None
    clip_skip: int | None = None
    max_sequence_length: int | None = None
    prompt_2: str | None = None
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None

    def given(self) -> dict[str, object]:
        """Return what was asked, by name."""
        values: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        levels = {name: list(value) for name in ("sigmas", "timesteps") if (value := getattr(self, name)) is not None}
        return {name: value for name, value in values.items() if value is not None} | levels


NO_OPTIONS = PipelineOptions()


@dataclass(frozen=True, slots=True)
class UnresolvedRequest:
    """A parsed request; values that are None get the base's defaults.

    `model` is the id in the route (a base or an adapter), None if the route has none. `mask` goes with `image` and has
    its size; `references` are further pictures of an edit, after `image`. `num_previews` is the most previews of each
    image in a stream. `encoding` None asks for pixels. `key` is the name of the caller's API key, for log lines.
    """

    prompt: str
    model: str | None = None
    adapters: tuple[AdapterRef, ...] = ()
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    num_images: int = 1
    image: PixelImage | None = None
    references: tuple[PixelImage, ...] = ()
    strength: float | None = None
    mask: PixelMask | None = None
    options: PipelineOptions = NO_OPTIONS
    scheduler_options: tuple[tuple[str, SchedulerOption], ...] = ()
    num_previews: int = 0
    encoding: Encoding | None = None
    priority: Priority = "interactive"
    due: WallClockDeadline | None = None
    hub_token: HubToken | None = field(default=None, repr=False)
    key: str | None = None
    prompt_syntax: PromptSyntax | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request with nothing left open: the same value gives the same image on any replica.

    `adapters` are in their fixed order of application. Image i of `num_images` is drawn with `seed + i`. `scheduler`
    None means the base's own. With `image`, width and height are the output's size; `references` are further pictures
    of an edit, each of its own size. `denoiser_runs` is how often the denoiser runs in each step for one image, None
    if the base's family is unknown. `share` names the caller whose part of the devices' time it takes, without
    telling who that is, and `share_weight` says how large a part. `encoding` None asks for pixels. `whole_images`
    is set in a part of a request: how many images the whole has, by which the part is as urgent. `waited_s` is for
    how long it has waited on replicas that gave it back. These, `num_previews`, `priority`, `due` and `trace`
    change no image.
    """

    request_id: str
    base_id: str
    prompt: str
    negative_prompt: str | None
    adapters: tuple[ScaledAdapter, ...]
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str | None
    seed: int
    num_images: int = 1
    image: PixelImage | None = None
    references: tuple[PixelImage, ...] = ()
    strength: float | None = None
    mask: PixelMask | None = None
    options: PipelineOptions = NO_OPTIONS
    scheduler_options: tuple[tuple[str, SchedulerOption], ...] = ()
    denoiser_runs: int | None = None
    num_previews: int = 0
    encoding: Encoding | None = None
    priority: Priority = "interactive"
    due: WallClockDeadline | None = None
    hub_token: HubToken | None = field(default=None, repr=False)
    trace: TraceContext | None = field(default=None, repr=False, compare=False)
    share: str = ""
    share_weight: float = 1.0
    whole_images: int | None = None
    waited_s: float = 0.0
    prompt_syntax: PromptSyntax = "plain"

    def part(self, first: int, count: int) -> GenerationRequest:
        """Return the request for `count` of its images from number `first` on, each with the seed that it has here."""
        if count == self.num_images:
            return self
        whole = self.whole_images or self.num_images
        return replace(self, num_images=count, seed=(self.seed + first) % SEEDS, whole_images=whole)

    @property
    def planned_steps(self) -> int:
        """The number of steps that will run; image-to-image runs the fraction given by its strength."""
        return self.steps if self.strength is None else min(int(self.steps * self.strength), self.steps)


class GivenBack(Exception):
    """A replica has not begun a request and gives it back, since another may begin it sooner."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(waited_s)
        self.waited_s = waited_s


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the milliseconds of one request went; `suspended_ms` while others had the device between two steps."""

    queue_ms: float = 0.0
    fetch_ms: float = 0.0
    swap_ms: float = 0.0
    suspended_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    encode_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One applied adapter: how many layers of its file matched the base, out of all in the file."""

    id: str
    revision: str
    scale: Scale
    layers_matched: int
    layers_in_file: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The images of one request, with their seeds, adapters and timings.

    `batch_size` counts the images of the device pass; with 1 the result is bit-reproducible. `compute_s` is the time on
    the device, and `device_s` the request's own part of it where others shared the pass.
    """

    request_id: str
    base_id: str
    images: tuple[PixelImage | EncodedImage, ...]
    seeds: tuple[int, ...]
    adapters: tuple[AppliedAdapter, ...]
    timings: Timings
    compute_s: float
    device: str
    batch_size: int
    warnings: tuple[str, ...] = ()
    device_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first event of a stream: all checks that need no device have passed."""

    base_id: str
    seed: int
    width: int
    height: int
    steps: int


@dataclass(frozen=True, slots=True)
class Starting:
    """No replica of the base runs: one will in `expected_s`, from when there is room; None where that is not known."""

    expected_s: float | None
    has_room: bool = True


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is.

    `queue_position` counts the requests that go before it on its replica, waiting or running: 0 when it is its turn. A
    request that has made steps and is not at 0 was set aside for others.
    `steps` is how many it will really run, which image-to-image lowers with its strength.
    """

    queue_position: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A preview of an unfinished image, smaller than the finished one by the base's latent factor.

    `index` counts the previews of this image, `image_index` the images of the request; both start at 0.
    """

    index: int
    image_index: int
    image: PixelImage


GenerationEvent = Accepted | Starting | Progress | Preview | GenerationResult
"""The events of a stream: first one `Accepted`, then starts, progress and previews, last the result."""
