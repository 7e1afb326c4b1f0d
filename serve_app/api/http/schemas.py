"""Models shared by the wire shapes: the strict model, the entry that names one adapter, and the bodies of errors.

Bounds that depend on the base are checked elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serve_app.api.http.openapi_responses import refusals
from serve_app.api.http.validation import refusal
from serve_app.core import AdapterRef, PipelineOptions, PromptSyntax, Scale, Scales, SchedulerOption

INT64_MAX = 2**63 - 1
MAX_NAME_LENGTH = 256
MAX_ADAPTERS_NAMED = 64
MAX_SCALE_READ = 1e6

M = TypeVar("M", bound=BaseModel)


class RequestModel(BaseModel):
    """A strict model: unknown fields are refused, nothing is converted, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def validate_model(model: type[M], data: JsonValue | Mapping[str, Any], *, is_text: bool = False) -> M:
    """Return JSON data as a model; where `is_text`, numbers and booleans are text.

    Raises:
        UnknownParameter: a field that does not exist.
        MalformedRequest: a missing field, or one of the wrong type.
        OutOfBounds: a value that no base could take.
    """
    try:
        return model.model_validate(data, strict=not is_text)
    except ValidationError as error:
        raise refusal(model, error) from None


def _digits_to_int(value: Any) -> Any:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 19:
        return int(value)
    return value


def _id_to_entry(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def _number_to_scales(value: Any) -> Any:
    if value is None or isinstance(value, dict | ScalesEntry):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("unfit", "must be a number, or an object with 'denoiser' and 'text_encoder'")
    if abs(value) > MAX_SCALE_READ or not isfinite(value):
        raise PydanticCustomError("unfit", "must be a finite number of ordinary size")
    return {"denoiser": value, "text_encoder": value}


Int = Annotated[int, Field(ge=-INT64_MAX, le=INT64_MAX)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
Seed = Annotated[
    int,
    Field(ge=0, le=INT64_MAX),
    BeforeValidator(_digits_to_int, json_schema_input_type=Annotated[int, Field(ge=0)] | str),
]


class ScalesEntry(RequestModel):
    """Scales of their own for denoiser and text encoders; `unet` and `transformer` are other names for the denoiser.

    A scale that is absent is 1.
    """

    denoiser: float | None = None
    unet: float | None = None
    transformer: float | None = None
    text_encoder: float | None = None

    @model_validator(mode="after")
    def _unambiguous(self) -> ScalesEntry:
        if sum(value is not None for value in (self.denoiser, self.unet, self.transformer)) > 1:
            raise PydanticCustomError("unfit", "takes one of 'denoiser', 'unet' and 'transformer'")
        return self

    def value(self) -> Scale:
        """Return one number where both are the same."""
        denoiser = next((one for one in (self.denoiser, self.unet, self.transformer) if one is not None), 1.0)
        text_encoder = 1.0 if self.text_encoder is None else self.text_encoder
        return denoiser if denoiser == text_encoder else Scales(denoiser, text_encoder)


ScaleEntry = Annotated[
    ScalesEntry | None,
    BeforeValidator(_number_to_scales, json_schema_input_type=float | ScalesEntry | None),
]


class LoraEntry(RequestModel):
    """One adapter: one of `id`, `name` and `path` (an id, never a file), and at most one scale.

    Beside `path`, `name` is only what the caller calls it, as other services have it.
    """

    id: Name | None = None
    name: Name | None = None
    path: Name | None = None
    scale: ScaleEntry = None
    weight: ScaleEntry = None
    revision: Name | None = None
    filename: Name | None = None

    @model_validator(mode="after")
    def _unambiguous(self) -> LoraEntry:
        named = [name for name in ("id", "name", "path") if getattr(self, name) is not None]
        if len(named) != 1 and named != ["name", "path"]:
            raise PydanticCustomError("unfit", "needs exactly one of 'id', 'name' and 'path'")
        if self.scale is not None and self.weight is not None:
            raise PydanticCustomError("unfit", "takes 'scale' or 'weight', not both")
        return self

    def ref(self) -> AdapterRef:
        """Return the adapter that this names."""
        scale = self.scale if self.scale is not None else self.weight
        return AdapterRef(
            id=(self.id or self.path or self.name or "").strip(),
            scale=None if scale is None else scale.value(),
            revision=self.revision,
            filename=self.filename,
        )


LoraEntryOrId = Annotated[LoraEntry, BeforeValidator(_id_to_entry, json_schema_input_type=LoraEntry | str)]
LoraEntries = Annotated[list[LoraEntryOrId], Field(max_length=MAX_ADAPTERS_NAMED)]


class PipelineParameters(RequestModel):
    """Parameters that only some base families take; `/v1/bases` says which."""

    true_cfg_scale: float | None = Field(default=None, ge=0, le=100, description="guidance by a negative prompt")
    guidance_rescale: float | None = Field(default=None, ge=0, le=1)
    clip_skip: Annotated[int, Field(ge=0, le=12)] | None = None
    max_sequence_length: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="how many tokens of the prompt are read"
    )
    prompt_2: Annotated[str, Field(max_length=10_000)] | None = Field(
        default=None, description="the prompt of the second text encoder"
    )
    sigmas: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1, max_length=1000)] | None = Field(
        default=None, description="the noise levels of the steps, in place of their number"
    )
    timesteps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1000)] | None = Field(
        default=None, description="the timesteps of the steps, in place of their number"
    )
    prompt_syntax: PromptSyntax | None = Field(
        default=None,
        description="how the prompts are written: plain, a1111 or comfyui, with weights such as (word:1.3), longer "
        "than the base's window, and adapters as <lora:name:0.8>; else as the key or the base has it",
    )
    scheduler_options: dict[Name, bool | int | float | str] | None = Field(
        default=None, description="shift, timestep_spacing, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas"
    )

    def options(self) -> PipelineOptions:
        """Return what was asked of a pipeline."""
        return PipelineOptions(
            true_cfg_scale=self.true_cfg_scale,
            guidance_rescale=self.guidance_rescale,
            clip_skip=self.clip_skip,
            max_sequence_length=self.max_sequence_length,
            prompt_2=self.prompt_2,
            sigmas=None if self.sigmas is None else tuple(self.sigmas),
            timesteps=None if self.timesteps is None else tuple(self.timesteps),
        )

    def sorted_scheduler_options(self) -> tuple[tuple[str, SchedulerOption], ...]:
        """Return what was asked of a scheduler."""
        return tuple(sorted((self.scheduler_options or {}).items()))


class ErrorBody(BaseModel):
    """The fields of every error of this family."""

    error: str = Field(description="one sentence that names the thing, the limit and what to do")
    code: str = Field(description="the stable name of the error")


class ErrorDetail(BaseModel):
    """The error."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """The fields of every error of this family."""

    error: ErrorDetail


ERROR_REPLIES = refusals(ErrorEnvelope, 400, 401, 403, 404, 408, 413, 422, 429, 431, 500, 503, 504)
"""The replies to refused requests in the OpenAI shape and the registry's, for the OpenAPI document."""
