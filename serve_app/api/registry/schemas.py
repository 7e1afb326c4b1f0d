"""The fields of the registry's requests and replies.

Owns the wire models of `/v1/loras`, `/v1/replicas`, `/v1/bases` and `/v1/usage`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.api.http.schemas import Int, Name, RequestModel
from serve_app.core import PromptSyntax

MAX_TEXT = 10_000
MAX_REPLICAS_ASKED = 1000


class ScalesReply(BaseModel):
    """Scales of their own for denoiser and text encoders."""

    denoiser: float
    text_encoder: float


class LoraSource(RequestModel):
    """Which adapter an alias stands for: an id, never a path or an address."""

    uri: Name = Field(description="a Hub id, or the id of an adapter in a configured folder; also as 'hf://<id>'")
    revision: Name | None = Field(default=None, description="a branch, tag or commit; the newest where absent")
    filename: Name | None = Field(default=None, description="the file, where the repository holds several adapters")


class LoraDefaults(RequestModel):
    """Values for requests that name an adapter and set none themselves; null where it sets none."""

    scale: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    scheduler: Name | None = None
    scheduler_options: dict[Name, bool | int | float | str] | None = None
    sigmas: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1, max_length=1000)] | None = None
    timesteps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1000)] | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    trigger_words: Annotated[str, Field(max_length=MAX_TEXT)] | None = Field(
        default=None, description="shown to people; no prompt is changed"
    )

    @model_validator(mode="after")
    def _unambiguous(self) -> LoraDefaults:
        if sum(one is not None for one in (self.num_inference_steps, self.sigmas, self.timesteps)) > 1:
            raise PydanticCustomError("unfit", "takes one of 'num_inference_steps', 'sigmas' and 'timesteps'")
        return self

    def value(self) -> AdapterDefaults:
        """Return the defaults."""
        return AdapterDefaults(
            scale=self.scale,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            scheduler_options=tuple(sorted((self.scheduler_options or {}).items())),
            sigmas=None if self.sigmas is None else tuple(self.sigmas),
            timesteps=None if self.timesteps is None else tuple(self.timesteps),
            negative_prompt=self.negative_prompt,
            trigger_words=self.trigger_words,
        )


class LoraDefaultsReply(BaseModel):
    """Values for requests that name an adapter and set none themselves; null where it sets none."""

    scale: float | None
    num_inference_steps: int | None
    guidance_scale: float | None
    scheduler: str | None
    scheduler_options: dict[str, bool | float | str]
    sigmas: list[float] | None
    timesteps: list[int] | None
    negative_prompt: str | None
    trigger_words: str | None = Field(description="shown to people; no prompt is changed")


class NewLora(RequestModel):
    """An alias to be made; the adapter is resolved before the reply."""

    lora_name: Name = Field(description="the new name; letters, digits, '.', '_' and '-', with at most one '/'")
    source: LoraSource
    preload: bool | Int | None = Field(
        default=None, description="true, or how many replicas should have it in memory before the reply"
    )
    defaults: LoraDefaults | None = Field(default=None, description="they go before those of the adapter itself")
    replace: bool | None = Field(default=None, description="true: move the alias where it already names another")


class PreloadOrder(RequestModel):
    """How many replicas should hold an adapter."""

    replicas: Int | None = Field(default=None, ge=1, le=MAX_REPLICAS_ASKED, description="1 where absent")


class Residence(BaseModel):
    """A replica that holds an adapter, and the fastest tier it is on there."""

    replica: str
    tier: Literal["applied", "device", "host"]


class QuarantinedLora(BaseModel):
    """That a replica refuses an adapter for now, because its images failed on the device again and again."""

    replica: str
    scale: float | ScalesReply = Field(description="it is refused at this scale alone")
    beside: int = Field(description="it is refused together with so many certain other adapters")
    reason: str
    retry_after_s: int = Field(description="for how long")


class Lora(BaseModel):
    """An adapter known so far, or an alias of one."""

    id: str
    object: Literal["lora"] = "lora"
    revision: str
    base_model: str
    rank: int = Field(description="the largest of its layers")
    size_bytes: int
    layers_matched: int | None = Field(description="null until some replica has read the file")
    alias_of: str | None
    aliases: list[str]
    resident: list[Residence]
    hits: int = Field(description="requests for it, on the replicas that run now")
    last_used: float | None = Field(description="seconds since 1970")
    instance_prompt: str | None = Field(description="its trigger words")
    has_picture: bool = Field(description="whether a picture comes with it; it is at `/v1/pictures/<id>`")
    defaults: LoraDefaultsReply
    quarantine: list[QuarantinedLora] = Field(description="what replicas refuse of it, the longest first")


class LoraList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Lora]


class DeletedLora(BaseModel):
    """The result of a removal."""

    id: str
    object: Literal["lora"] = "lora"
    deleted: bool = Field(description="true where an alias is gone; an adapter's own id stays")
    replicas: list[str] = Field(description="those that forget the adapter once no request uses it")


class PreloadedLora(BaseModel):
    """Which replicas hold the adapter now."""

    id: str
    object: Literal["lora"] = "lora"
    asked: int
    replicas: list[str]


class AppliedLora(BaseModel):
    """An adapter in a replica's weights."""

    id: str
    scale: float | ScalesReply


class HeldLora(BaseModel):
    """An adapter in a replica's memory."""

    id: str
    tier: Literal["device", "host"]


class Replica(BaseModel):
    """The work and the adapters of a replica."""

    id: str
    base_model: str
    state: Literal["RUNNING", "STARTING", "SILENT"] = Field(description="SILENT: it runs, but did not answer in time")
    device: str | None
    waiting: int = Field(description="requests in its queue")
    running: int = Field(description="requests on its device")
    applied: list[AppliedLora]
    adapters: list[HeldLora]
    backlog_s: float = Field(description="predicted seconds of work that it has accepted")


class ReplicaList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Replica]


class BaseDefaults(BaseModel):
    """The values of a request that sets none."""

    steps: int
    guidance_scale: float
    width: int
    height: int
    strength: float


class BaseLimits(BaseModel):
    """The limits of one request."""

    max_steps: int
    min_side: int
    max_side: int
    side_multiple: int = Field(default=8, description="sides are multiples of it")
    min_steps: int = 1
    max_pixels: int
    max_images: int
    max_input_images: int
    max_guidance_scale: float
    max_prompt_characters: int
    max_adapters: int
    max_adapter_scale: float


class FusedLora(BaseModel):
    """An adapter that is part of a base in every request."""

    id: str
    scale: float


class Base(BaseModel):
    """A base, with all that a form for it must know."""

    id: str
    aliases: list[str]
    is_default: bool
    canary_of: str | None = Field(default=None, description="the base some of whose requests it draws")
    share: float | None = Field(default=None, description="of that base's requests, those that it draws")
    state: Literal["running", "starting", "waiting", "failed", "stopped"] = Field(
        description="waiting: no node has room for a replica; stopped: it has none, and the next request starts one"
    )
    since: float | None = Field(description="when the start began, in seconds since 1970")
    expected_s: float | None = Field(
        description="seconds until one runs, by the last start; if it waits, from when it has room; null if unknown"
    )
    reason: str | None = Field(description="why it waits, or has failed")
    defaults: BaseDefaults
    limits: BaseLimits
    fused: list[FusedLora] = Field(description="adapters that are part of it")
    schedulers: list[str] = Field(description="what `scheduler` may be; shorter names are understood too")
    family: str | None = Field(default=None, description="null, as what follows, until some replica has started")
    tasks: dict[str, list[str]] | None = Field(
        default=None, description="what it draws from (text, image, inpaint, edit), each with its optional parameters"
    )
    tokens: int | None = Field(default=None, description="how many tokens of a prompt are read")
    has_previews: bool | None = Field(default=None, description="whether streams can carry previews")
    prompt_syntax: PromptSyntax = Field(description="what `prompt_syntax` is where neither a request nor its key says")
    prompt_syntaxes: list[PromptSyntax] | None = Field(default=None, description="what it may be")
    fuses_adapters: bool | None = Field(
        default=None, description="false where it is quantised: adapters lie beside its layers, LoRA factors alone"
    )


class Usage(BaseModel):
    """What was drawn on one day with one key on one base."""

    day: str = Field(description="of UTC, such as 2026-11-30")
    key: str | None = Field(description="the name of the key; null for requests without one")
    base_model: str
    images: int
    device_seconds: float = Field(description="the images' part of the time on devices")


class UsageList(BaseModel):
    """All of it, by day, key and base."""

    object: Literal["list"] = "list"
    data: list[Usage]
