"""The whole configuration, checked before anything starts.

Owns `AppConfig`: what `args:` of the application in a Serve file may say. Every model refuses unknown keys and names
the nearest known one. Must not read the environment, files or the network: `serve_app.app` does, once.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

# Noise schedulers of diffusers that accept the epsilon and v-prediction configurations of the Stable Diffusion
# families and need no further package.
DIFFUSION_SCHEDULERS: tuple[str, ...] = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

# Bases whose own VAE overflows in float16, and the VAE that is known to replace it.
HALF_PRECISION_VAES = {"stabilityai/stable-diffusion-xl-base-1.0": "madebyollin/sdxl-vae-fp16-fix"}


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cast("dict[Any, Any]", data)
        known = list(cls.model_fields)
        unknown = [str(key) for key in fields if key not in known]
        if unknown:
            raise ValueError("; ".join(f"unknown key '{key}'{nearest(key, known)}" for key in unknown))
        return fields


class ModelSource(StrictModel):
    """Where a model lies: exactly one of a Hub id, a folder or an embedded demo model."""

    hub: str | None = None
    folder: Path | None = None
    embedded: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSource:
        if sum(place is not None for place in (self.hub, self.folder, self.embedded)) != 1:
            raise ValueError("name exactly one of 'hub', 'folder' and 'embedded'")
        if self.revision is not None and self.hub is None:
            raise ValueError("'revision' goes with 'hub'")
        return self


class Limits(StrictModel):
    """What one request may ask of a base."""

    max_steps: PositiveInt = 100
    min_side: PositiveInt = 64
    max_side: PositiveInt = 2048
    max_pixels: PositiveInt = 1024 * 1024
    max_images: PositiveInt = 4
    max_guidance_scale: PositiveFloat = 30.0
    max_prompt_characters: PositiveInt = 10_000
    max_adapters: PositiveInt = 8
    max_adapter_scale: PositiveFloat = 10.0


class Defaults(StrictModel):
    """What a request gets where it says nothing."""

    steps: PositiveInt = 30
    guidance_scale: NonNegativeFloat = 7.5
    width: PositiveInt = 512
    height: PositiveInt = 512
    strength: float = Field(default=0.8, gt=0, le=1)


class AutoscalingSettings(StrictModel):
    """Ray Serve's autoscaling of one deployment, in Ray's own terms."""

    min_replicas: int = Field(default=1, ge=0)
    initial_replicas: int | None = Field(default=None, ge=0)
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 2.0
    metrics_interval_s: PositiveFloat = 1.0
    look_back_period_s: PositiveFloat = 5.0
    upscale_delay_s: NonNegativeFloat = 0.0
    downscale_delay_s: NonNegativeFloat = 300.0
    downscale_to_zero_delay_s: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is over max_replicas {self.max_replicas}")
        if self.initial_replicas is not None and not (self.min_replicas <= self.initial_replicas <= self.max_replicas):
            raise ValueError("initial_replicas must lie between min_replicas and max_replicas")
        return self


class ReplicaSettings(StrictModel):
    """What one replica of a base is given, and how much it takes on.

    `torch_threads` None means one thread for each whole CPU: torch's threads spin, and more of them than CPUs make
    everything on the node slow. `prepare_ahead` says whether the next request's adapters are fused while a request
    runs: "auto" only on GPUs, since on a CPU that takes the cores of the running image. `device_cache` is what
    adapters may take of a GPU's memory, apart from the weights; a CPU has no such tier. `pristine_in` says where the
    loaded weights are kept while adapters are fused: on the device, beside the fused ones, or on the host, which takes
    nothing more of the device but makes each swap copy; "auto" takes the host where a GPU is too small.
    """

    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    torch_threads: PositiveInt | None = None
    max_ongoing_requests: PositiveInt = 16
    max_queued_requests: PositiveInt = 64
    max_batch_images: PositiveInt = 4
    adapters_per_replica: PositiveInt = 32
    host_cache: ByteSize = Field(default=ByteSize(2 * 1024**3), validate_default=True)
    device_cache: ByteSize = Field(default=ByteSize(2 * 1024**3), validate_default=True)
    prepare_ahead: Literal["auto", "always", "never"] = "auto"
    pristine_in: Literal["auto", "device", "host"] = "auto"
    health_check_period_s: PositiveFloat = 5.0
    graceful_shutdown_timeout_s: PositiveFloat = 120.0


class AdapterLimits(StrictModel):
    """What an adapter file may be."""

    max_rank: PositiveInt = 512
    max_file: ByteSize = Field(default=ByteSize(4 * 1024**3), validate_default=True)
    max_tensors: PositiveInt = 20_000
    admission_timeout_s: PositiveFloat = 60.0


class BaseModelConfig(StrictModel):
    """One base model: its public id, where it comes from, and how it is served.

    `compile` has torch compile the denoiser at its first use, which takes a minute or two and a compiler on the node.
    """

    id: str
    aliases: tuple[str, ...] = ()
    source: ModelSource
    vae: ModelSource | None = None
    dtype: DTypeName = "auto"
    variant: str | None = None
    compile: bool = False
    scheduler: str | None = None
    schedulers: tuple[str, ...] = DIFFUSION_SCHEDULERS
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    adapter_limits: AdapterLimits = AdapterLimits()
    replica: ReplicaSettings = ReplicaSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> BaseModelConfig:
        limits, defaults = self.limits, self.defaults
        if defaults.steps > limits.max_steps:
            raise ValueError(f"{self.id}: default steps {defaults.steps} are over max_steps {limits.max_steps}")
        for side in (defaults.width, defaults.height):
            if side % 8 or not limits.min_side <= side <= limits.max_side:
                raise ValueError(
                    f"{self.id}: default side {side} must be a multiple of 8 "
                    f"from {limits.min_side} to {limits.max_side}"
                )
        if defaults.width * defaults.height > limits.max_pixels:
            raise ValueError(f"{self.id}: the default size is over max_pixels {limits.max_pixels}")
        if self.replica.max_ongoing_requests < self.autoscaling.target_ongoing_requests:
            raise ValueError(
                f"{self.id}: max_ongoing_requests {self.replica.max_ongoing_requests} is under "
                f"target_ongoing_requests {self.autoscaling.target_ongoing_requests:g}: it would never scale up"
            )
        return self

    @property
    def vae_source(self) -> ModelSource | None:
        """The VAE that replaces the base's own: the configured one, else in float16 the one known to be needed."""
        known = HALF_PRECISION_VAES.get(self.source.hub or "") if self.dtype == "float16" else None
        return self.vae or (ModelSource(hub=known) if known else None)

    @property
    def names(self) -> tuple[str, ...]:
        """Every id that means this base."""
        return (self.id, *self.aliases)


class HubSettings(StrictModel):
    """How adapters are found on the Hugging Face Hub; `endpoint` None means the environment's, else the public one."""

    enabled: bool = True
    endpoint: str | None = None
    timeout_s: PositiveFloat = 10.0
    download_timeout_s: PositiveFloat = 600.0


class AdapterSources(StrictModel):
    """Where adapters may come from, asked in this order: embedded, folders, the Hub.

    A folder holds Hub-shaped repositories as `<owner>/<name>/`.
    """

    embedded: bool = False
    folders: tuple[Path, ...] = ()
    hub: HubSettings = HubSettings()
    resolution_ttl_s: PositiveFloat = 300.0
    failure_ttl_s: PositiveFloat = 15.0


class IngressSettings(StrictModel):
    """The HTTP face: how many replicas, and what a request may weigh."""

    replicas: PositiveInt = 2
    num_cpus: NonNegativeFloat = 0.5
    max_ongoing_requests: PositiveInt = 256
    max_body: ByteSize = Field(default=ByteSize(32 * 1024**2), validate_default=True)
    max_image_pixels: PositiveInt = 4096 * 4096
    request_timeout_s: PositiveFloat = 300.0
    max_retries: int = Field(default=2, ge=0)
    cors_origins: tuple[str, ...] = ()


class AppConfig(StrictModel):
    """One Loraplex application: its bases, its adapter sources, its HTTP face.

    `cache_dir` holds the admitted adapters of each node; None means a folder under the user's cache directory.
    """

    bases: tuple[BaseModelConfig, ...] = Field(min_length=1)
    default_base: str | None = None
    adapters: AdapterSources = AdapterSources()
    ingress: IngressSettings = IngressSettings()
    cache_dir: Path | None = None
    cache_size: ByteSize = Field(default=ByteSize(20 * 1024**3), validate_default=True)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("bases")
    @classmethod
    def _distinct_names(cls, bases: tuple[BaseModelConfig, ...]) -> tuple[BaseModelConfig, ...]:
        seen: dict[str, str] = {}
        for base in bases:
            for name in base.names:
                if name in seen:
                    raise ValueError(f"'{name}' names both {seen[name]} and {base.id}")
                seen[name] = base.id
        return bases

    @model_validator(mode="after")
    def _default_is_served(self) -> AppConfig:
        if self.default_base is not None and self.base(self.default_base) is None:
            names = [name for base in self.bases for name in base.names]
            raise ValueError(f"default_base '{self.default_base}' is not a base{nearest(self.default_base, names)}")
        return self

    def base(self, name: str) -> BaseModelConfig | None:
        """Return the base that an id or alias means, or None."""
        return next((base for base in self.bases if name in base.names), None)

    @property
    def default(self) -> BaseModelConfig:
        """The base that serves a request which names none."""
        found = self.base(self.default_base) if self.default_base else None
        return found or self.bases[0]


class Environment(StrictModel):
    """What the process environment says, read once by `serve_app.app` and handed down."""

    hub_token: SecretStr | None = None
    hub_endpoint: str | None = None
    cache_dir: Path
