"""The whole configuration, validated before anything starts.

Owns the `args:` of the applications in a Serve file, `BaseArguments` and `IngressArguments`, and `AppConfig`, the whole
that an ingress goes by. Every model refuses unknown keys and names the nearest known one. Must not read the
environment, files or the network: `serve_app.environment` does, once.
"""

from __future__ import annotations

import hashlib
from math import isqrt
from pathlib import Path
from typing import Literal

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

from serve_app.core import PromptSyntax
from serve_app.families.family import Family
from serve_app.families.quantised import Quantization
from serve_app.settings import (
    AdapterLimits,
    AutoscalingSettings,
    Canary,
    Defaults,
    FusedAdapter,
    IngressAutoscaling,
    Limits,
    MetricsSettings,
    ModelSource,
    RedisAddress,
    RegistrySettings,
    ReplicaSettings,
    RouterSettings,
    StrictModel,
    TracingSettings,
    nearest,
)
from serve_app.source_settings import AdapterSources, AdapterStore, BaseFileSettings

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

# Bases whose own VAE overflows in float16, and the VAE that is known to replace it.
HALF_PRECISION_VAES = {"stabilityai/stable-diffusion-xl-base-1.0": "madebyollin/sdxl-vae-fp16-fix"}


def serve_name(base_id: str) -> str:
    """Return what a base is called in Serve, which forbids slashes in names."""
    return base_id.replace("/", "--")


class BaseModelConfig(StrictModel):
    """One base model: its public id, where it comes from, and how it is served.

    `compile` has torch compile the denoiser when a replica starts, which takes a minute or two and a compiler on the
    node. `memory_format` is how convolutions lay out their weights and values: "auto" is channels_last on a GPU.
    `vae_tiling` decodes large images tile by tile, which needs less memory and shows faintly: "auto" does so only for
    sides over twice those that the VAE was trained for. `parts` replaces parts of the base, by the names in its index;
    `vae` is short for the part of that name; a part may be a single file. `schedulers` None means all that fit the
    base; `scheduler_options` change the configuration of its own one, such as `shift` or `rescale_betas_zero_snr`.
    `fused` adapters, such as a distillation, are fused into the loaded weights once and belong to the base.
    `prompt_syntax` is that of requests which name none. `quantization` packs the denoiser's weights while they are
    loaded; adapters then lie beside its layers, unfused. The service is ready once every `required` base runs.
    `application` is the name of its Serve application; None means its id with "--" for "/".
    """

    id: str
    application: str | None = None
    aliases: tuple[str, ...] = ()
    required: bool = False
    source: ModelSource
    vae: ModelSource | None = None
    parts: dict[str, ModelSource] = Field(default_factory=dict)
    fused: tuple[FusedAdapter, ...] = ()
    dtype: DTypeName = "auto"
    variant: str | None = None
    quantization: Quantization | None = None
    compile: bool = False
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    vae_tiling: Literal["auto", "always", "never"] = "auto"
    scheduler: str | None = None
    schedulers: tuple[str, ...] | None = None
    scheduler_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    prompt_syntax: PromptSyntax = "plain"
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
        if self.vae is not None and "vae" in self.parts:
            raise ValueError(f"{self.id}: name the VAE once, in 'vae' or in 'parts'")
        if len({adapter.id for adapter in self.fused}) < len(self.fused):
            raise ValueError(f"{self.id}: 'fused' names an adapter twice")
        self.source.check_as_base(self.id, variant=self.variant)
        if self.quantization is not None:
            self._check_quantization()
        if any(part.config is not None for part in self.part_sources.values()):
            raise ValueError(f"{self.id}: the single file of a part takes no 'config': it has that of its base")
        if defaults.width * defaults.height > limits.max_pixels:
            raise ValueError(f"{self.id}: the default size is over max_pixels {limits.max_pixels}")
        self._check_replicas()
        return self

    def _check_replicas(self) -> None:
        if self.required and not self.autoscaling.min_replicas:
            raise ValueError(f"{self.id}: 'required' goes with min_replicas of 1 or more: at zero it is not ready")
        if self.replica.max_ongoing_requests < self.autoscaling.target_ongoing_requests:
            raise ValueError(
                f"{self.id}: max_ongoing_requests {self.replica.max_ongoing_requests} is under "
                f"target_ongoing_requests {self.autoscaling.target_ongoing_requests:g}: it would never scale up"
            )

    def _check_quantization(self) -> None:
        parts = [part for name, part in self.part_sources.items() if name in ("unet", "transformer")]
        if any(source.is_single_file for source in (self.source, *parts)):
            raise ValueError(f"{self.id}: 'quantization' goes with a denoiser in a folder, not with a single file")
        if self.needs_full_weights is not None:
            raise ValueError(f"{self.id}: {self.needs_full_weights}")

    def with_defaults_of(self, family: Family) -> BaseModelConfig:
        """Return the base with the defaults of its family where the configuration says nothing, within its limits."""
        given, limits, known = self.defaults.model_fields_set, self.limits, family.defaults
        highest = min(known.side, limits.max_side, isqrt(limits.max_pixels))
        side = max(limits.min_side, highest // family.side_multiple * family.side_multiple)
        size = {} if given & {"width", "height"} else {"width": side, "height": side}
        found = {"steps": min(known.steps, limits.max_steps), "guidance_scale": known.guidance_scale, **size}
        if family.is_known:
            found = {name: value for name, value in found.items() if name not in given}
            return self.model_copy(update={"defaults": self.defaults.model_copy(update=found)})
        return self

    @property
    def needs_full_weights(self) -> str | None:
        """Why the settings do not go with quantised weights, into which nothing is fused; None where they do."""
        asked = {
            "fused": bool(self.fused),
            "compile": self.compile,
            "replica.base_weights: host": self.replica.base_weights == "host",
            "replica.prefetch_swap: always": self.replica.prefetch_swap == "always",
        }
        setting = next((name for name, is_asked in asked.items() if is_asked), None)
        return setting and f"'{setting}' needs full weights, and a quantised base has none to fuse adapters into"

    @property
    def part_sources(self) -> dict[str, ModelSource]:
        """The replacements for parts of the base: those configured, and in float16 the VAE known to be needed."""
        known = HALF_PRECISION_VAES.get(self.source.hub or "") if self.dtype == "float16" else None
        vae = self.vae or (ModelSource(hub=known) if known else None)
        return ({"vae": vae} if vae else {}) | self.parts

    @property
    def names(self) -> tuple[str, ...]:
        """Every id that means this base."""
        return (self.id, *self.aliases)

    @property
    def application_name(self) -> str:
        """The name of its Serve application."""
        return self.application or serve_name(self.id)


class IngressSettings(StrictModel):
    """The ingress: its replicas, and the limits of a request.

    A caller has `body_timeout_s` to send a body. A stream that is silent for `sse_ping_interval_s` gets a comment, so
    that proxies keep it open. A request whose replica dies is sent again at most `max_retries` times. An ingress
    replica that fails three health checks in a row, each with `health_check_timeout_s`, is replaced.

    `max_json` limits JSON apart from a picture in base64, `decode_timeout_s` the processor time of decoding a picture.
    Only web pages of the service itself and of `cors_origins` may draw and change. A service that is bound to loopback
    answers to localhost, to addresses, and to `hosts`. An ingress replica looks up at most `unknown_ids_per_minute`
    unknown ids for a key or an address. Without `draw_pictures` an adapter has the picture that comes with it, or none.

    `autoscaling` takes the place of `replicas`. `resources` and `max_replicas_per_node` say where its replicas may run.
    """

    renamed = {"keep_alive_s": "sse_ping_interval_s"}
    replicas: PositiveInt = 2
    autoscaling: IngressAutoscaling | None = None
    num_cpus: NonNegativeFloat = 0.5
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    max_replicas_per_node: PositiveInt | None = None
    max_ongoing_requests: PositiveInt = 256
    max_body: ByteSize = Field(default=ByteSize(32 * 1024**2), validate_default=True)
    max_json: ByteSize = Field(default=ByteSize(1024**2), validate_default=True)
    max_image_pixels: PositiveInt = 4096 * 4096
    decode_timeout_s: PositiveFloat = 10.0
    body_timeout_s: PositiveFloat = 30.0
    sse_ping_interval_s: PositiveFloat = 15.0
    draw_pictures: bool = True
    max_retries: int = Field(default=2, ge=0)
    health_check_period_s: PositiveFloat = 5.0
    health_check_timeout_s: PositiveFloat = 10.0
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    unknown_ids_per_minute: PositiveInt = 60

    @model_validator(mode="after")
    def _one_number(self) -> IngressSettings:
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError("give either 'replicas' or 'autoscaling', not both")
        return self

    @property
    def max_replicas(self) -> int:
        """The most replicas that there may be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas


class KeyLimits(StrictModel):
    """The limits of an API key; None means no limit. `burst` None means one second's requests."""

    requests_per_s: PositiveFloat | None = None
    burst: PositiveInt | None = None
    concurrency: PositiveInt | None = None
    images_per_minute: PositiveInt | None = None


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key in hex, as in a configuration. Keys are random and need no salt."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKey(StrictModel):
    """A key by its name, which appears in logs, and the SHA-256 of the key itself; `admin` may change the registry.

    Where several keys want a device at once, each has a part of its time in proportion to its `weight`. `prompt_syntax`
    is that of its requests which name none, before the base's.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    admin: bool = False
    prompt_syntax: PromptSyntax | None = None
    weight: float = Field(default=1.0, ge=0.01, le=100)
    limits: KeyLimits = KeyLimits()


class AuthSettings(StrictModel):
    """The callers of the service: by keys given here or in a YAML file on every ingress node; without keys, any caller.

    The file has `keys:` in the same form, and is read again when it changes. Limits of keys are counted in Redis at
    `limits_redis`, such as `redis://redis:6379/0`; without it each ingress replica grants its share of them.
    """

    keys: tuple[ApiKey, ...] = ()
    keys_file: Path | None = None
    limits_redis: RedisAddress = None

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {field}")
        return keys


class SharedSettings(StrictModel):
    """What the ingress and all bases of one service go by; a change restarts them all.

    `service` is the name of the ingress' application. A request has `request_timeout_s` from its arrival to its answer.
    `cache_dir` is the folder of each node's files; None means a folder in the user's cache directory. `{node}` in it
    becomes the Ray node's id, for nodes that share a file system. `disk_cache` limits the admitted adapters in it.
    With `infotext`, PNGs say how they were drawn: prompt, seed, adapters, as A1111 writes it.
    """

    renamed = {"cache_size": "disk_cache"}
    service: str = "loraplex"
    adapters: AdapterSources = AdapterSources()
    base_files: BaseFileSettings = BaseFileSettings()
    tracing: TracingSettings = TracingSettings()
    request_timeout_s: PositiveFloat = 300.0
    infotext: bool = True
    cache_dir: Path | None = None
    disk_cache: ByteSize = Field(default=ByteSize(20 * 1024**3), validate_default=True)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @property
    def all_stores(self) -> tuple[AdapterStore, ...]:
        """Every object store that a node reads."""
        return (*self.adapters.stores, *self.base_files.stores)


class BaseArguments(StrictModel):
    """The `args` of a base's application; a change restarts this base alone, but for one of `shared`."""

    shared: SharedSettings = SharedSettings()
    base: BaseModelConfig


class IngressArguments(StrictModel):
    """The `args` of the ingress' application; a change restarts its replicas.

    What may change without that, the bases among it, is its `user_config`: `serve_app.live_settings`.
    """

    shared: SharedSettings = SharedSettings()
    ingress: IngressSettings = IngressSettings()
    registry: RegistrySettings = RegistrySettings()
    auth: AuthSettings = AuthSettings()
    metrics: MetricsSettings = MetricsSettings()


class AppConfig(SharedSettings):
    """A whole service as its ingress knows it: the bases, and the settings of its `args` and `user_config`."""

    bases: tuple[BaseModelConfig, ...] = Field(min_length=1)
    default_base: str | None = None
    canaries: dict[str, Canary] = Field(default_factory=dict)
    ingress: IngressSettings = IngressSettings()
    registry: RegistrySettings = RegistrySettings()
    auth: AuthSettings = AuthSettings()
    metrics: MetricsSettings = MetricsSettings()

    @field_validator("bases")
    @classmethod
    def _distinct_names(cls, bases: tuple[BaseModelConfig, ...]) -> tuple[BaseModelConfig, ...]:
        if len({base.application_name for base in bases}) < len(bases):
            raise ValueError("two bases have the same 'application'")
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
    def originals(self) -> tuple[BaseModelConfig, ...]:
        """The bases that are no canaries."""
        return tuple(base for base in self.bases if self.original_of(base.id) is None)

    def original_of(self, base_id: str) -> str | None:
        """Return the base some of whose requests a canary draws, None for what is no canary."""
        return next((base for base, canary in self.canaries.items() if canary.base == base_id), None)

    @property
    def default(self) -> BaseModelConfig:
        """The base for requests that name none."""
        found = self.base(self.default_base) if self.default_base else None
        return found or self.bases[0]


class Environment(StrictModel):
    """The values of the process environment, read once by `serve_app.environment` and passed on."""

    hub_token: SecretStr | None = None
    hub_endpoint: str | None = None
    cache_dir: Path
    registry_redis: RedisAddress = None

    @property
    def token(self) -> str | None:
        """The Hub token in clear text, for the Hub's client only."""
        return self.hub_token.get_secret_value() if self.hub_token else None
