"""The values that cross boundaries: adapters, requests, images.

Owns the immutable dataclasses that the HTTP layer, the ingress, the replicas and the engine hand to one another.
Must not know Ray, torch, HTTP or the file system.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

# Who waits for a request: a person, or a job that may take its time.
Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Scales:
    """How strongly an adapter acts where it acts differently on the denoiser and on the text encoders."""

    denoiser: float
    text_encoder: float

    def __format__(self, spec: str) -> str:
        """Return `denoiser/text encoder`, each number in the format asked for."""
        return f"{self.denoiser:{spec}}/{self.text_encoder:{spec}}"


# One number for everything that an adapter changes, or one for each kind of part.
Scale = float | Scales


def scale_of(scale: Scale, component: str) -> float:
    """Return the number that holds for a component of a pipeline, such as `unet` or `text_encoder_2`."""
    if not isinstance(scale, Scales):
        return scale
    return scale.text_encoder if component.startswith("text_encoder") else scale.denoiser


@dataclass(frozen=True, slots=True)
class HubToken:
    """A caller's own token for the Hub; no text that is made of it, or of what holds it, shows it."""

    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in which trace something belongs, in the two headers of W3C's Trace Context."""

    traceparent: str
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as a request names it, before anything is known about it."""

    id: str
    scale: Scale = 1.0
    revision: str | None = None
    filename: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter file, resolved: which base it is for, which file, which bytes.

    `revision` fixes the bytes: a commit hash for a Hub repository, a content digest for a folder. `location` is where
    the file lies (a Hub repository id or a folder) and never reaches a client. `embeddings` is the file beside it with
    the words that it teaches the text encoders, `settings` the text of peft's `adapter_config.json` beside it, which
    says how it is scaled.
    """

    id: str
    base_id: str
    revision: str
    filename: str
    origin: str
    location: str
    size_bytes: int
    instance_prompt: str | None = None
    embeddings: str | None = None
    settings: str | None = None

    @property
    def key(self) -> str:
        """The name of these bytes, the same in every process; a request's scale is never part of it."""
        name = f"{self.id}@{self.revision[:16]}/{self.filename}"
        return name if self.settings is None else f"{name}+{sha256(self.settings.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class ScaledAdapter:
    """A resolved adapter at the scale that one request asks for."""

    spec: AdapterSpec
    scale: Scale


@dataclass(frozen=True, slots=True)
class PixelImage:
    """An uncompressed picture: `pixels` holds `height * width` RGB triples of 8 bits, row by row."""

    width: int
    height: int
    pixels: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PixelMask:
    """Which part of a picture is to be drawn anew: one byte per pixel, row by row, 255 for anew and 0 for kept."""

    width: int
    height: int
    values: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class WallClockDeadline:
    """When a request must be answered: at `at`, in seconds since 1970, `limit_s` after it came in."""

    at: float
    limit_s: float


@dataclass(frozen=True, slots=True)
class UnresolvedRequest:
    """A request as it was asked: whatever is None is for the base's defaults to fill in.

    `model` is the id in the route (a base or an adapter), None where the route names none. `mask` goes with `image`
    and has its size. `num_previews` is how many previews of each image a stream should carry at most. `key` is the name
    of the caller's key, for log lines.
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
    strength: float | None = None
    mask: PixelMask | None = None
    num_previews: int = 0
    priority: Priority = "interactive"
    due: WallClockDeadline | None = None
    hub_token: HubToken | None = field(default=None, repr=False)
    key: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request with nothing left open: the same value gives the same image on any replica.

    `adapters` are in their fixed order of application. Image i of `num_images` is drawn with `seed + i`. `scheduler`
    None means the base's own. With `image`, width and height are the output's size. `num_previews`, `priority`, `due`
    and `trace` change no image.
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
    strength: float | None = None
    mask: PixelMask | None = None
    num_previews: int = 0
    priority: Priority = "interactive"
    due: WallClockDeadline | None = None
    hub_token: HubToken | None = field(default=None, repr=False)
    trace: TraceContext | None = field(default=None, repr=False, compare=False)

    @property
    def planned_steps(self) -> int:
        """How many steps it will run: of image-to-image, the share that its strength says."""
        return self.steps if self.strength is None else min(int(self.steps * self.strength), self.steps)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the milliseconds of one request went."""

    queue_ms: float = 0.0
    fetch_ms: float = 0.0
    swap_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """What was applied for one adapter: how many layers of the base its file matched, out of those it names."""

    id: str
    revision: str
    scale: Scale
    layers_matched: int
    layers_in_file: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The images of one request and how they came about.

    `batch_size` counts the images that shared the device pass: 1 means that the result is bit-reproducible.
    `compute_s` is the time on the device.
    """

    request_id: str
    base_id: str
    images: tuple[PixelImage, ...]
    seeds: tuple[int, ...]
    adapters: tuple[AppliedAdapter, ...]
    timings: Timings
    compute_s: float
    device: str
    batch_size: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first event of a stream: everything that can be refused early has been checked."""

    base_id: str
    seed: int
    width: int
    height: int
    steps: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is.

    `queue_position` counts the requests that go before it on its replica, waiting or running: 0 when it is its turn.
    `steps` is how many it will really run, which image-to-image lowers with its strength.
    """

    queue_position: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What an image looks like on the way: `image` is smaller than the finished one by the base's latent factor.

    `index` counts the previews of this image, `image_index` the images of the request; both from 0.
    """

    index: int
    image_index: int
    image: PixelImage


GenerationEvent = Accepted | Progress | Preview | GenerationResult
"""What a stream carries: first one `Accepted`, then progress and previews, last the result."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a request may name: a base, or an adapter with the base it is for.

    `created` is in seconds since 1970, 0 where nobody knows.
    """

    id: str
    base_id: str | None
    owned_by: str
    created: int
