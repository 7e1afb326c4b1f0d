"""The whole configuration, checked before anything starts.

Owns `AppConfig`: what `args:` of the application in a Serve file may say. Every model refuses unknown keys and names
the nearest known one. Must not read the environment, files or the network: `serve_app.environment` does, once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import (
    ByteSize,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)

from serve_app.settings import (
    AdapterLimits,
    AutoscalingSettings,
    Defaults,
    Limits,
    ModelSource,
    ReplicaSettings,
    RouterSettings,
    StrictModel,
    nearest,
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


class BaseModelConfig(StrictModel):
    """One base model: its public id, where it comes from, and how it is served.

    `compile` has torch compile the denoiser when a replica starts, which takes a minute or two and a compiler on the
    node. `memory_format` is how convolutions lay out their weights and values: "auto" is channels_last on a GPU.
    `vae_tiling` decodes large images tile by tile, which needs less memory and shows faintly: "auto" does so only for
    sides over twice those that the VAE was trained for.
    """

    id: str
    aliases: tuple[str, ...] = ()
    source: ModelSource
    vae: ModelSource | None = None
    dtype: DTypeName = "auto"
    variant: str | None = None
    compile: bool = False
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    vae_tiling: Literal["auto", "always", "never"] = "auto"
    scheduler: str | None = None
    schedulers: tuple[str, ...] = DIFFUSION_SCHEDULERS
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    adapter_limits: AdapterLimits = AdapterLimits()
    replica: ReplicaSettings = ReplicaSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    router: RouterSettings = RouterSettings()

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
    """How adapters are found on the Hugging Face Hub; `endpoint` None means the environment's, else the public one.

    With `forward_tokens`, adapters are looked up as anybody sees them, and what not everybody may read with the
    caller's own token; a check of a caller's access counts for `access_ttl_s`. The service's token is then for bases
    alone. `cache_size` is what fetched files may take of a node's disk beside the admitted ones made of them.
    """

    enabled: bool = True
    endpoint: str | None = None
    timeout_s: PositiveFloat = 10.0
    download_timeout_s: PositiveFloat = 600.0
    forward_tokens: bool = False
    access_ttl_s: PositiveFloat = 60.0
    cache_size: ByteSize = Field(default=ByteSize(10 * 1024**3), validate_default=True)


class SharingSettings(StrictModel):
    """Whether adapter files travel between nodes, so that the cluster fetches each from the Hub once.

    `memory` is what shared files may take of Ray's object store, which spills to disk, over the whole cluster; `disk`
    what came from peers may take of a node's. After `patience_s` a node no longer waits for another's fetch.
    """

    enabled: bool = False
    patience_s: PositiveFloat = 60.0
    memory: ByteSize = Field(default=ByteSize(4 * 1024**3), validate_default=True)
    disk: ByteSize = Field(default=ByteSize(10 * 1024**3), validate_default=True)


class AdapterSources(StrictModel):
    """Where adapters may come from, asked in this order: embedded, folders, the Hub.

    A folder holds Hub-shaped repositories as `<owner>/<name>/`.
    """

    embedded: bool = False
    folders: tuple[Path, ...] = ()
    hub: HubSettings = HubSettings()
    sharing: SharingSettings = SharingSettings()
    resolution_ttl_s: PositiveFloat = 300.0
    failure_ttl_s: PositiveFloat = 15.0


class IngressSettings(StrictModel):
    """The HTTP face: how many replicas, and what a request may weigh.

    `max_json` is what JSON may weigh beside a picture in base64. `decode_timeout_s` is how much of a processor's time
    one picture may take. `body_timeout_s` is how long a caller may take to send a body; `keep_alive_s` how long a
    stream is silent before a comment keeps proxies from cutting it. A request whose replica dies is sent again
    `max_retries` times. A replica of the face that gives no answer to three health checks in a row, each within
    `health_check_timeout_s`, is replaced. Web pages of `cors_origins`, and of no other origin but the service's own,
    may draw and change. A service that is bound to loopback answers to names of this machine, to addresses, and to
    `hosts`. An ingress replica looks up `unknown_ids_per_minute` ids that nothing is known of for a key or an address.
    """

    replicas: PositiveInt = 2
    num_cpus: NonNegativeFloat = 0.5
    max_ongoing_requests: PositiveInt = 256
    max_body: ByteSize = Field(default=ByteSize(32 * 1024**2), validate_default=True)
    max_json: ByteSize = Field(default=ByteSize(1024**2), validate_default=True)
    max_image_pixels: PositiveInt = 4096 * 4096
    decode_timeout_s: PositiveFloat = 10.0
    body_timeout_s: PositiveFloat = 30.0
    keep_alive_s: PositiveFloat = 15.0
    request_timeout_s: PositiveFloat = 300.0
    max_retries: int = Field(default=2, ge=0)
    health_check_period_s: PositiveFloat = 5.0
    health_check_timeout_s: PositiveFloat = 10.0
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    unknown_ids_per_minute: PositiveInt = 60


class RegistrySettings(StrictModel):
    """Where aliases are kept: a file on the head node; None means `registry.sqlite3` in the cache's folder."""

    path: Path | None = None


class KeyLimits(StrictModel):
    """What a key may ask of the service; None means no limit. `burst` None means one second's requests."""

    requests_per_s: PositiveFloat | None = None
    burst: PositiveInt | None = None
    concurrency: PositiveInt | None = None
    images_per_minute: PositiveInt | None = None


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key in hex, as configurations hold it. Keys are random, and so need no salt."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKey(StrictModel):
    """A key by its name, which appears in logs, and the SHA-256 of the key itself; `admin` may change the registry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    admin: bool = False
    limits: KeyLimits = KeyLimits()


class AuthSettings(StrictModel):
    """Who may use the service: keys here, or in a YAML file that every ingress node has; with none, everybody.

    The file holds `keys:` in the same form, and is read again when it changes.
    """

    keys: tuple[ApiKey, ...] = ()
    keys_file: Path | None = None

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {field}")
        return keys


class TracingSettings(StrictModel):
    """Where OpenTelemetry traces go, by OTLP over HTTP, such as `http://collector:4318`; None for nowhere.

    `sample` is the share of requests that are traced, of those whose caller has not decided that with `traceparent`.
    """

    endpoint: str | None = None
    sample: float = Field(default=0.1, ge=0.0, le=1.0)

    @field_validator("endpoint")
    @classmethod
    def _plain_address(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("endpoint must be the address of a collector, such as http://collector:4318")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("endpoint is an address alone; credentials go into OTEL_EXPORTER_OTLP_HEADERS on nodes")
        return endpoint.rstrip("/")


class MetricsSettings(StrictModel):
    """How many adapters have metrics of their own: those asked for most of late; the rest are counted together."""

    top_adapters: int = Field(default=20, ge=0, le=200)


class AppConfig(StrictModel):
    """One Loraplex application: its bases, its adapter sources, its HTTP face.

    `cache_dir` holds the admitted adapters of each node; None means a folder under the user's cache directory. `{node}`
    in it becomes the Ray node's id, for nodes that share a file system.
    """

    bases: tuple[BaseModelConfig, ...] = Field(min_length=1)
    default_base: str | None = None
    adapters: AdapterSources = AdapterSources()
    ingress: IngressSettings = IngressSettings()
    registry: RegistrySettings = RegistrySettings()
    auth: AuthSettings = AuthSettings()
    tracing: TracingSettings = TracingSettings()
    metrics: MetricsSettings = MetricsSettings()
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
    """What the process environment says, read once by `serve_app.environment` and handed down."""

    hub_token: SecretStr | None = None
    hub_endpoint: str | None = None
    cache_dir: Path

    @property
    def token(self) -> str | None:
        """The Hub token in the clear, for the Hub's client alone."""
        return self.hub_token.get_secret_value() if self.hub_token else None
