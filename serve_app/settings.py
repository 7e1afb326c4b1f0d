"""The settings of one base, of aliases, traces and metrics, and the strict model that all settings share.

Owns a base's source, limits, defaults, replicas, router, autoscaling and canary. `serve_app.config` puts them together.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

log = logging.getLogger(__name__)


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or an empty string."""
    words = set(name.split("_"))
    match = [one for one in known if words < set(one.split("_"))] or difflib.get_close_matches(name, known, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys and names the nearest known one.

    `renamed` maps a key's former name to its present one. The former name works for one version, with a warning.
    """

    renamed: ClassVar[dict[str, str]] = {}
    # A value may be a key, a token or an address with a password, and Serve prints what does not validate.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = dict(cast("dict[Any, Any]", data))
        known = list(cls.model_fields)
        for old in fields.keys() & cls.renamed.keys():
            new = cls.renamed[old]
            if new in fields:
                raise ValueError(f"'{old}' is the former name of '{new}'; keep only '{new}'")
            log.warning("the setting '%s' is now called '%s'; the next version refuses the former name", old, new)
            fields[new] = fields.pop(old)
        unknown = [str(key) for key in fields if key not in known]
        if unknown:
            raise ValueError("; ".join(f"unknown key '{key}'{nearest(key, known)}" for key in unknown))
        return fields


def faults_of(error: ValidationError, prefix: str) -> list[str]:
    """Return a line for each fault that pydantic found, without the values."""
    return [
        f"{prefix}{'.'.join(str(part) for part in fault['loc'])}".rstrip(".")
        + f": {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors(include_url=False, include_input=False)
    ]


class ModelSource(StrictModel):
    """Where a model is: exactly one of a Hub id, a folder, a single file of weights or an embedded demo model.

    With `filename` a Hub id means that single file of its repository. Weights alone do not make a base: `config` is a
    base in diffusers' form whose structure, tokenizers and scheduler those of a single file are.
    """

    hub: str | None = None
    folder: Path | None = None
    file: Path | None = None
    embedded: str | None = None
    revision: str | None = None
    filename: str | None = None
    config: ModelSource | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSource:
        if sum(value is not None for value in (self.hub, self.folder, self.file, self.embedded)) != 1:
            raise ValueError("name exactly one of 'hub', 'folder', 'file' and 'embedded'")
        for name in ("revision", "filename"):
            if getattr(self, name) is not None and self.hub is None:
                raise ValueError(f"'{name}' goes with 'hub'")
        name = self.filename if self.file is None else self.file.name
        if name is not None and not name.endswith(".safetensors"):
            raise ValueError(f"'{name}' is no .safetensors file; pickled and GGUF checkpoints are not read")
        if self.config is not None and (name is None or self.config.is_single_file):
            raise ValueError("'config' goes with a single file, and names a base that is none")
        return self

    @property
    def is_single_file(self) -> bool:
        """Whether this is one file of weights."""
        return self.file is not None or self.filename is not None

    @property
    def described_by(self) -> ModelSource:
        """Where the configuration files of the model are."""
        return self.config or self

    def check_as_base(self, base_id: str, *, variant: str | None) -> None:
        """Refuse what a whole base cannot be read from.

        Raises:
            ValueError: a single file has no configuration beside it, or is to have a variant.
        """
        if self.is_single_file and self.config is None:
            raise ValueError(
                f"{base_id}: a single file holds weights alone; add 'config' to its source, {{hub: ID}} or {{folder: "
                "PATH}} of a base of its structure, such as stabilityai/stable-diffusion-xl-base-1.0 for SDXL and what "
                "was trained from it, or stable-diffusion-v1-5/stable-diffusion-v1-5"
            )
        if self.is_single_file and variant is not None:
            raise ValueError(f"{base_id}: 'variant' chooses among the files of a base, and a single file has none")


class FusedAdapter(StrictModel):
    """An adapter that is part of a base: fused into the weights that are loaded, before any request."""

    id: str
    scale: float = Field(default=1.0, allow_inf_nan=False)
    revision: str | None = None
    filename: str | None = None


class Limits(StrictModel):
    """The limits of one request to a base."""

    max_steps: PositiveInt = 100
    min_side: PositiveInt = 64
    max_side: PositiveInt = 2048
    max_pixels: PositiveInt = 1024 * 1024
    max_images: PositiveInt = 4
    max_input_images: PositiveInt = 4
    max_guidance_scale: PositiveFloat = 30.0
    max_prompt_characters: PositiveInt = 10_000
    max_adapters: PositiveInt = 8
    max_adapter_scale: PositiveFloat = 10.0


class Defaults(StrictModel):
    """The values of a request that gives none."""

    steps: PositiveInt = 30
    guidance_scale: NonNegativeFloat = 7.5
    width: PositiveInt = 512
    height: PositiveInt = 512
    strength: float = Field(default=0.8, gt=0, le=1)


class IngressAutoscaling(StrictModel):
    """Autoscaling of the ingress by Ray Serve's own policy; `target_ongoing_requests` includes those that wait."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt
    initial_replicas: PositiveInt | None = None
    target_ongoing_requests: PositiveFloat = 64.0
    upscale_delay_s: NonNegativeFloat = 10.0
    downscale_delay_s: NonNegativeFloat = 600.0

    @model_validator(mode="after")
    def _ordered(self) -> IngressAutoscaling:
        if not self.min_replicas <= (self.initial_replicas or self.min_replicas) <= self.max_replicas:
            raise ValueError("min_replicas, initial_replicas and max_replicas must be in this order")
        return self


class AutoscalingSettings(StrictModel):
    """Autoscaling of one deployment; all but the first four are Ray Serve's own settings.

    The policy "predicted_work" aims at no more than `target_wait_s` of predicted work waiting for each replica; "ray"
    is Serve's own policy and uses `target_ongoing_requests`. The first request to a base without replicas starts one.
    Where bases want more GPUs than there are, a second of a base's work counts `weight` seconds. `cluster_gpus` is how
    many GPUs the cluster may grow to; without it, those that are there are shared.
    """

    policy: Literal["predicted_work", "ray"] = "predicted_work"
    target_wait_s: PositiveFloat = 10.0
    weight: PositiveFloat = 1.0
    cluster_gpus: PositiveFloat | None = None
    min_replicas: int = Field(default=1, ge=0)
    initial_replicas: int | None = Field(default=None, ge=0)
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 2.0
    metrics_interval_s: PositiveFloat = 0.5
    look_back_period_s: PositiveFloat = 2.0
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
    """The resources of one replica of a base, its queue, its caches and its health checks.

    `torch_threads` None means one thread per whole CPU: more threads than CPUs make everything on the node slow.
    `resources` are further Ray resources, such as `accelerator_type:H100: 0.001` for a base that only such nodes can
    hold; no node runs more than `max_replicas_per_node`.

    `host_cache` and `device_cache` are the bytes for adapters in host and in GPU memory: bytes alone decide what a
    replica holds. `fused_cache` is what further copies of the layers, with adapters fused in, may take of the device
    as far as it is free: changing to one of them computes nothing. `max_warm_up_adapters` is how many adapters it
    fetches at most when it starts. `base_weights` says where the loaded weights are kept while adapters are fused: on
    the device, beside the fused ones, or on the host, which needs no further device memory but makes each swap copy;
    "auto" chooses the host if a GPU is too small.
    `prefetch_swap` fuses the next request's adapters while a request runs; "auto" only does so on GPUs, since on a
    CPU it slows the running image.

    With `step_sharing` requests take turns on the device between their steps: callers get equal parts of its time, and
    of one caller's requests the one with the least work left goes first, unless another's time from its arrival to its
    end would reach `max_slowdown` times what it takes alone. At most `max_jobs_in_progress` passes have begun at a
    time; all but one wait with their latents in the device's memory. Without it each pass has the device to its end,
    and requests that need no swap may overtake a waiting one `max_overtakes` times and for `max_overtaken_s`. A request
    of priority "batch" is queued as if it had arrived `batch_priority_delay_s` later.

    With `idle: host` each node where the base ran keeps the files of its weights in memory, within
    `shared.base_files.idle_memory`, after its last replica has gone, so that the next one there copies them.

    Requests are refused with more than
    `max_backlog_s` of predicted work waiting. A new replica fetches the adapters that others use most before it takes
    requests, within `warm_up_timeout_s` and `warm_up_size`.

    A replica is replaced after three health checks without a reply within `health_check_timeout_s`, or if its device
    has work and makes no progress for `stall_timeout_s`. None means 300 s, or 1200 s with `compile`; it must be longer
    than a whole batch, since a GPU's steps may be launched long before they run.
    `max_backlog_s` and `graceful_shutdown_timeout_s`, the time that a replica has to finish when it is to end, are
    `shared.request_timeout_s` where they are not set.
    """

    renamed = {
        "batch_delay_s": "batch_priority_delay_s",
        "adapters_per_replica": "max_warm_up_adapters",
        "max_advertised_adapters": "max_warm_up_adapters",
        "prepare_ahead": "prefetch_swap",
        "pristine_in": "base_weights",
        "stall_after_s": "stall_timeout_s",
    }

    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    torch_threads: PositiveInt | None = None
    max_ongoing_requests: PositiveInt = 64
    max_queued_requests: PositiveInt = 64
    max_batch_images: PositiveInt = 4
    step_sharing: bool = True
    max_jobs_in_progress: PositiveInt = 8
    max_slowdown: float = Field(default=20.0, ge=1)
    max_overtakes: int = Field(default=4, ge=0)
    max_overtaken_s: NonNegativeFloat = 5.0
    batch_priority_delay_s: NonNegativeFloat = 60.0
    max_backlog_s: PositiveFloat | None = None
    warm_up_timeout_s: NonNegativeFloat = 10.0
    warm_up_size: ByteSize = Field(default=ByteSize(1024**3), validate_default=True)
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    max_replicas_per_node: PositiveInt | None = None
    max_warm_up_adapters: PositiveInt = 32
    host_cache: ByteSize = Field(default=ByteSize(2 * 1024**3), validate_default=True)
    device_cache: ByteSize = Field(default=ByteSize(2 * 1024**3), validate_default=True)
    fused_cache: ByteSize = Field(default=ByteSize(2 * 1024**3), validate_default=True)
    prefetch_swap: Literal["auto", "always", "never"] = "auto"
    base_weights: Literal["auto", "device", "host"] = "auto"
    idle: Literal["disk", "host"] = "disk"
    health_check_period_s: PositiveFloat = 5.0
    health_check_timeout_s: PositiveFloat = 10.0
    stall_timeout_s: PositiveFloat | None = None
    graceful_shutdown_timeout_s: PositiveFloat | None = None


class RouterSettings(StrictModel):
    """How a base's requests are spread over its replicas: `router: ray` is short for `router: {policy: ray}`.

    The policy "loraplex" chooses the replica with the least predicted work, and counts missing adapters as work;
    "ray" is Serve's own policy. Replicas report their work every `stats_period_s`. A replica is used only as a last
    resort if its report is `stale_after_s` older than the others' or if its device makes no progress for
    `deprioritize_after_s`. While all replicas are full, a request waits at most `max_backoff_s` for the next try.
    """

    renamed = {"stall_after_s": "deprioritize_after_s"}

    policy: Literal["loraplex", "ray"] = "loraplex"
    stats_period_s: PositiveFloat = 0.25
    stale_after_s: float = Field(default=15.0, ge=10.0)
    deprioritize_after_s: PositiveFloat = 60.0
    max_backoff_s: PositiveFloat = 0.2

    @model_validator(mode="before")
    @classmethod
    def _policy_alone(cls, data: Any) -> Any:
        return {"policy": data} if isinstance(data, str) else data


class AdapterLimits(StrictModel):
    """The limits of an adapter file."""

    max_rank: PositiveInt = 512
    max_file: ByteSize = Field(default=ByteSize(4 * 1024**3), validate_default=True)
    max_tensors: PositiveInt = 20_000
    admission_timeout_s: PositiveFloat = 60.0


class Canary(StrictModel):
    """A base that draws the `share` of another one's requests."""

    base: str
    share: float = Field(gt=0, lt=1)


def _redis_address(url: SecretStr | None) -> SecretStr | None:
    if url is not None and not url.get_secret_value().startswith(("redis://", "rediss://")):
        raise ValueError("must begin with 'redis://' or 'rediss://'")
    return url


RedisAddress = Annotated[SecretStr | None, AfterValidator(_redis_address)]


class RegistrySettings(StrictModel):
    """Where aliases are kept: in the file `path` on the head node, None being `registry.sqlite3` in `cache_dir`, or in
    Redis at an address such as `redis://redis:6379/1`, which outlives the head."""

    path: Path | None = None
    redis: RedisAddress = None

    @model_validator(mode="after")
    def _one_place(self) -> RegistrySettings:
        if self.path is not None and self.redis is not None:
            raise ValueError("give either 'path' or 'redis', not both")
        return self


class TracingSettings(StrictModel):
    """Where OpenTelemetry traces are sent, as OTLP over HTTP, such as `http://collector:4318`; None disables them.

    `sample` is the fraction of requests that are traced, unless a request's `traceparent` header decides.
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
    """How many adapters have their own label in metrics: the most requested ones; all others share one."""

    top_adapters: int = Field(default=20, ge=0, le=200)
