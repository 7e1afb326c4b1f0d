"""The parts of one base's configuration, and the strictness that all of the configuration shares.

Owns what may be said of a base's source, limits, replicas, router and scaling. `serve_app.config` puts them together.
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
    model_validator,
)


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
    """Autoscaling of one deployment, in Ray Serve's own terms but for the first three.

    The policy "predicted_work" wants at most `target_wait_s` of predicted work before each replica; "ray" is Serve's
    own, which goes by `target_ongoing_requests`. The first request to a base without replicas starts
    `replicas_from_zero` at once, whatever comes with it.
    """

    policy: Literal["predicted_work", "ray"] = "predicted_work"
    target_wait_s: PositiveFloat = 10.0
    replicas_from_zero: PositiveInt = 1
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
        if self.replicas_from_zero > self.max_replicas:
            raise ValueError(f"replicas_from_zero {self.replicas_from_zero} is over max_replicas {self.max_replicas}")
        if self.replicas_from_zero > 1 and self.policy == "ray":
            raise ValueError("replicas_from_zero goes with the policy predicted_work")
        return self


class ReplicaSettings(StrictModel):
    """What one replica of a base is given, and how much it takes on.

    `torch_threads` None means one thread for each whole CPU: torch's threads spin, and more of them than CPUs make
    everything on the node slow. `prepare_ahead` says whether the next request's adapters are fused while a request
    runs: "auto" only on GPUs, since on a CPU that takes the cores of the running image. `device_cache` is what
    adapters may take of a GPU's memory, apart from the weights; a CPU has no such tier. `pristine_in` says where the
    loaded weights are kept while adapters are fused: on the device, beside the fused ones, or on the host, which takes
    nothing more of the device but makes each swap copy; "auto" takes the host where a GPU is too small. `resources` are
    Ray's further ones, such as `accelerator_type:H100: 0.001` for a base that only such nodes can hold.

    A waiting request may be overtaken by others that need no swap, `max_overtakes` times and for `max_overtaken_s`;
    one of priority "batch" also by interactive ones that come within `batch_delay_s` of it. With over `max_backlog_s`
    of predicted work ahead, requests are refused. A new replica fetches the adapters that others use most before it
    takes requests, for at most `warm_up_timeout_s` and `warm_up_size`. A replica that gives no answer to three health
    checks in a row, each within `health_check_timeout_s`, is replaced.

    A replica whose device makes no headway for `stall_after_s` though it has work is replaced. None means 300 s, or
    1200 s with `compile`; it must be longer than a whole pass, as a GPU's steps may be launched long before they run.
    """

    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    torch_threads: PositiveInt | None = None
    max_ongoing_requests: PositiveInt = 8
    max_queued_requests: PositiveInt = 64
    max_batch_images: PositiveInt = 4
    max_overtakes: int = Field(default=4, ge=0)
    max_overtaken_s: NonNegativeFloat = 5.0
    batch_delay_s: NonNegativeFloat = 60.0
    max_backlog_s: PositiveFloat = 300.0
    warm_up_timeout_s: NonNegativeFloat = 10.0
    warm_up_size: ByteSize = Field(default=ByteSize(1024**3), validate_default=True)
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    adapters_per_replica: PositiveInt = 32
    host_cache: ByteSize = Field(default=ByteSize(2 * 1024**3), validate_default=True)
    device_cache: ByteSize = Field(default=ByteSize(2 * 1024**3), validate_default=True)
    prepare_ahead: Literal["auto", "always", "never"] = "auto"
    pristine_in: Literal["auto", "device", "host"] = "auto"
    health_check_period_s: PositiveFloat = 5.0
    health_check_timeout_s: PositiveFloat = 10.0
    stall_after_s: PositiveFloat | None = None
    graceful_shutdown_timeout_s: PositiveFloat = 120.0


class RouterSettings(StrictModel):
    """How a base's requests are spread over its replicas: `router: ray` is short for `router: {policy: ray}`.

    The policy "loraplex" takes the replica that is predicted to finish first; "ray" is Serve's own. Replicas tell of
    themselves every `stats_period_s`. One whose news is `stale_after_s` behind that of the others, or whose device
    shows no headway for `stall_after_s`, gets only what no other takes. A request waits at most `max_backoff_s` for
    the next try while all replicas are full.
    """

    policy: Literal["loraplex", "ray"] = "loraplex"
    stats_period_s: PositiveFloat = 0.25
    stale_after_s: float = Field(default=15.0, ge=10.0)
    stall_after_s: PositiveFloat = 60.0
    max_backoff_s: PositiveFloat = 0.2

    @model_validator(mode="before")
    @classmethod
    def _policy_alone(cls, data: Any) -> Any:
        return {"policy": data} if isinstance(data, str) else data


class AdapterLimits(StrictModel):
    """What an adapter file may be."""

    max_rank: PositiveInt = 512
    max_file: ByteSize = Field(default=ByteSize(4 * 1024**3), validate_default=True)
    max_tensors: PositiveInt = 20_000
    admission_timeout_s: PositiveFloat = 60.0
