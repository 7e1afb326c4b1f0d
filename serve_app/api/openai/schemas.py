"""The fields of requests and replies of the OpenAI shape.

Owns the wire models of that family. Bounds that depend on the base are checked elsewhere.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from serve_app.api.http.body import parse_json
from serve_app.api.http.schemas import (
    MAX_ADAPTERS_NAMED,
    MAX_NAME_LENGTH,
    ErrorEnvelope,
    Int,
    LoraEntry,
    LoraEntryOrId,
    Name,
    PipelineParameters,
    Seed,
)
from serve_app.core import ImageFormat
from serve_app.errors import LoraplexError

MAX_PARTIAL_IMAGES = 3
# JSON text of as many adapters as are read, each with all that can be said of it.
MAX_ADAPTERS_TEXT = 64 * 1024
EventKind = Literal["image_generation", "image_edit"]

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def _entries(value: Any) -> Any:
    """Take one adapter or several, as an id, an object, an array, or a JSON string of one."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith(("[", "{")):
            return [text] if text else []
        if len(text) > MAX_ADAPTERS_TEXT:
            raise PydanticCustomError("unfit", "is text of over {limit} characters", {"limit": MAX_ADAPTERS_TEXT})
        try:
            value = parse_json(text.encode(errors="surrogatepass"), "its text")
        except LoraplexError as error:
            raise PydanticCustomError("unfit", "cannot be read: {error}", {"error": str(error)}) from None
    return [value] if isinstance(value, dict) else value


def _known_size(value: str) -> str:
    if value != "auto" and not _SIZE.fullmatch(value):
        raise PydanticCustomError("unfit", "must be 'auto' or width and height such as '512x768'")
    return value


LoraInput = Annotated[
    list[LoraEntryOrId],
    Field(max_length=MAX_ADAPTERS_NAMED),
    BeforeValidator(_entries, json_schema_input_type=str | LoraEntry | list[LoraEntry | str]),
]
Size = Annotated[str, AfterValidator(_known_size)]


class ImageGeneration(PipelineParameters):
    """A request for images; a field that is absent or null takes the base's default."""

    prompt: str
    model: Name | None = Field(default=None, description="a base, an adapter, or '<base>:<adapter>'")
    n: Int | None = Field(default=None, description="how many images; image i is drawn with seed + i")
    size: Size | None = Field(default=None, description="'auto', or width and height such as '512x768'")
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None,
        description="url: an address that holds the image itself, 'data:image/png;base64,...', as for a model called "
        "dall-e-... where this is absent",
    )
    output_format: ImageFormat | None = Field(default=None, description="png where absent")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="quality of jpeg and webp"
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        default=None, description="images are opaque; 'transparent' is accepted with a warning"
    )
    style: Annotated[str, Field(max_length=MAX_NAME_LENGTH)] | None = Field(
        default=None, description="accepted with a warning; adapters are for styles"
    )
    moderation: Literal["auto", "low"] | None = Field(default=None, description="accepted with a warning")
    quality: Literal["auto", "standard", "low", "medium", "high", "hd"] | None = Field(
        default=None, description="accepted, and changes nothing"
    )
    user: str | None = Field(default=None, description="accepted, and changes nothing")
    stream: bool | None = Field(default=None, description="true: progress, previews and images as events")
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = Field(
        default=None, description="how many previews of each image a stream carries at most"
    )
    negative_prompt: str | None = None
    num_inference_steps: Int | None = None
    guidance_scale: float | None = None
    seed: Seed | None = None
    scheduler: Name | None = None
    lora: LoraInput | None = Field(default=None, description="an adapter; the same as `loras`")
    loras: LoraInput | None = Field(default=None, description="an id, an object, an array, or JSON text of one")

    def unused(self) -> tuple[str, ...]:
        """Return a warning for each field that was accepted and changes nothing."""
        warnings = {
            "style": self.style and "'style' changes nothing here: name an adapter for a style",
            "moderation": self.moderation and "'moderation' changes nothing here",
            "background": self.background == "transparent" and "'background' is opaque: no base draws transparency",
        }
        return tuple(warning for warning in warnings.values() if warning)

    @property
    def has_urls(self) -> bool:
        """Whether images come as addresses: clients made for DALL-E ask for nothing and read no other."""
        if self.response_format is None:
            return (self.model or "").startswith("dall-e-")
        return self.response_format == "url"

    def pixels(self) -> tuple[int, int] | tuple[None, None]:
        """Return width and height, None for both where the base or the picture decides."""
        found = _SIZE.fullmatch(self.size or "")
        return (int(found[1]), int(found[2])) if found else (None, None)


class ImageEdit(ImageGeneration):
    """A request for changed versions of a picture, beside the picture itself."""

    strength: float | None = Field(default=None, description="over 0 (keep the picture) to 1 (ignore it)")
    input_fidelity: Literal["high", "low"] | None = Field(default=None, description="accepted with a warning")

    def unused(self) -> tuple[str, ...]:
        """Return a warning for each field that was accepted and changes nothing."""
        fidelity = "'input_fidelity' changes nothing here: 'strength' says how much of the picture stays"
        return (*super().unused(), *((fidelity,) if self.input_fidelity else ()))


class ImageEditForm(ImageEdit):
    """The form of an edit, for the document alone: numbers as text, the picture as a file."""

    image: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]
    mask: Annotated[bytes, Field(json_schema_extra={"format": "binary"})] | None = Field(
        default=None, description="as large as the picture; where it is transparent, the picture is redrawn"
    )


class AdapterReport(BaseModel):
    """One adapter as it was applied."""

    id: str
    revision: str
    scale: float | dict[str, float] = Field(description="or an object with 'denoiser' and 'text_encoder'")
    layers_matched: int
    layers_in_file: int


class Report(BaseModel):
    """How the images came about."""

    seed: int = Field(description="of the first image; each next one has the next seed")
    base_model: str
    adapters: list[AdapterReport]
    timing_ms: dict[str, float]
    warnings: list[str]


class ImageData(BaseModel):
    """One image: in base64, or as a data URL where that was asked for."""

    b64_json: str | None = None
    url: str | None = None


class TokenDetails(BaseModel):
    """No tokens are counted here."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Zero: this service counts no tokens, and clients expect the field."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class ImagesReply(BaseModel):
    """The images and how they came about."""

    created: int
    data: list[ImageData]
    background: str = "opaque"
    output_format: ImageFormat
    size: str
    usage: Usage = Usage()
    loraplex: Report


def _event_types(what: str) -> list[JsonValue]:
    return [f"{kind}.{what}" for kind in get_args(EventKind)]


class ProgressEvent(BaseModel):
    """How far a request is; clients that do not know it pass it over."""

    type: str = Field(json_schema_extra={"enum": _event_types("progress")})
    queue_position: int | None = Field(description="requests that go before it; null while it is on its way there")
    step: int
    steps: int


class StartingEvent(BaseModel):
    """That no replica of the base runs yet; clients that do not know it pass it over."""

    type: str = Field(json_schema_extra={"enum": _event_types("starting")})
    base_model: str
    state: Literal["starting", "waiting"] = Field(description="waiting: no node has room for a replica")
    expected_s: float | None = Field(
        description="seconds until one runs, by the last start; if it waits, from when it has room; null if unknown"
    )


class ImageEvent(BaseModel):
    """The fields of every event with an image."""

    b64_json: str
    created_at: int
    size: str
    quality: str
    background: str = "opaque"
    output_format: ImageFormat
    image_index: int = Field(description="which image of the request")


class PartialImageEvent(ImageEvent):
    """A preview: a rough picture of where the image is heading."""

    type: str = Field(json_schema_extra={"enum": _event_types("partial_image")})
    partial_image_index: int


class CompletedEvent(ImageEvent):
    """One finished image."""

    type: str = Field(json_schema_extra={"enum": _event_types("completed")})
    usage: Usage = Usage()
    loraplex: Report


class Model(BaseModel):
    """A base, or an adapter known so far."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(BaseModel):
    """One page of models."""

    object: Literal["list"] = "list"
    data: list[Model]
    first_id: str | None
    last_id: str | None
    has_more: bool


EVENTS = (StartingEvent, ProgressEvent, PartialImageEvent, CompletedEvent)
"""The data of a stream's events, beside an `ErrorEnvelope`, which ends a stream that failed."""


def _event_schema(names: JsonValue, data: type[BaseModel]) -> dict[str, Any]:
    told = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{data.__name__}"},
    }
    named = {"type": "string", "enum": names}
    return {"type": "object", "required": ["event", "data"], "properties": {"event": named, "data": told}}


EVENTS_SCHEMA: dict[str, Any] = {
    "description": "server-sent events, each of one of these forms",
    "oneOf": [
        _event_schema(_event_types("starting"), StartingEvent),
        _event_schema(_event_types("progress"), ProgressEvent),
        _event_schema(_event_types("partial_image"), PartialImageEvent),
        _event_schema(_event_types("completed"), CompletedEvent),
        _event_schema(["error"], ErrorEnvelope),
    ],
}
