"""How long things take on a kind of machine: the numbers that the simulator is fed.

Owns the file of measurements and what is said of a wrong one. Must not know what is done with the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from serve_app.errors import LoraplexError
from serve_app.settings import StrictModel
from serve_app.work import LatencyModel

OWN_PROFILES = "profiles.yaml"
ANY_BASE = "*"


class TimingsInvalid(LoraplexError):
    """A file of measurements cannot be used."""

    reason: str
    code = "timings_invalid"
    template = "{reason}"


@dataclass(frozen=True, slots=True)
class LinearCost:
    """How long one step on an adapter's way takes: a fixed time, and a time for its bytes."""

    fixed_s: float
    byte_s: float

    def seconds(self, size_bytes: int) -> float:
        """Return the time for a file of this size."""
        return self.fixed_s + self.byte_s * size_bytes


@dataclass(frozen=True, slots=True)
class TierCosts:
    """The times of the steps between the tiers.

    `swap` changes the weights once, to any composition; `to_device`, `to_host` and `fetch` bring an adapter
    from host memory, from the node's disk, and from its source through admission.
    """

    swap: LinearCost
    to_device: LinearCost
    to_host: LinearCost
    fetch: LinearCost


@dataclass(frozen=True, slots=True)
class BaseTimings:
    """One base on one kind of machine; `start_s` is how long a new replica takes to be ready."""

    pace: LatencyModel
    start_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of machine. `blog_swap_s` is a change of adapters the old way; `unproved` names what is unmeasured."""

    name: str
    about: str
    bases: dict[str, BaseTimings]
    costs: TierCosts
    blog_swap_s: float
    host_cache_bytes: int
    disk_cache_bytes: int
    max_batch_images: int
    replicas_per_node: int
    sources: dict[str, str]
    unproved: tuple[str, ...]

    def base(self, base_id: str) -> BaseTimings:
        """Return a base's timings, those of `*` where it has none of its own.

        Raises:
            TimingsInvalid: there are neither.
        """
        found = self.bases.get(base_id) or self.bases.get(ANY_BASE)
        if found is None:
            raise TimingsInvalid(f"profile '{self.name}' has no timings for the base '{base_id}', nor for '{ANY_BASE}'")
        return found


class _Step(StrictModel):
    fixed_s: NonNegativeFloat
    bytes_per_s: PositiveFloat | None = None

    def step(self) -> LinearCost:
        return LinearCost(self.fixed_s, 1 / self.bytes_per_s if self.bytes_per_s else 0.0)


class _Base(StrictModel):
    pass_s: NonNegativeFloat
    unit_s: NonNegativeFloat
    start_s: NonNegativeFloat


class _Profile(StrictModel):
    about: str
    bases: dict[str, _Base] = Field(min_length=1)
    swap: _Step
    to_device: _Step
    to_host: _Step
    fetch: _Step
    blog_swap_s: NonNegativeFloat
    host_cache_bytes: PositiveInt
    disk_cache_bytes: NonNegativeInt
    max_batch_images: PositiveInt
    replicas_per_node: PositiveInt
    sources: dict[str, str]
    unproved: tuple[str, ...]


class _File(StrictModel):
    profiles: dict[str, _Profile]


def read_profile(name: str, path: Path | None = None) -> Profile:
    """Return a profile of a file, by default of the one that comes with the package.

    Raises:
        TimingsInvalid: the file cannot be read, breaks a rule, or has no such profile.
    """
    shown = path.name if path is not None else OWN_PROFILES
    known = _read(path, shown).profiles
    if name not in known:
        raise TimingsInvalid(f"{shown} has no profile '{name}'; it has {', '.join(known)}")
    found = known[name]
    return Profile(
        name=name,
        about=found.about,
        bases={
            base_id: BaseTimings(LatencyModel(base.pass_s, base.unit_s), base.start_s)
            for base_id, base in found.bases.items()
        },
        costs=TierCosts(found.swap.step(), found.to_device.step(), found.to_host.step(), found.fetch.step()),
        blog_swap_s=found.blog_swap_s,
        host_cache_bytes=found.host_cache_bytes,
        disk_cache_bytes=found.disk_cache_bytes,
        max_batch_images=found.max_batch_images,
        replicas_per_node=found.replicas_per_node,
        sources=found.sources,
        unproved=found.unproved,
    )


def _read(path: Path | None, shown: str) -> _File:
    try:
        text = (files("serve_app.bench.simulation") / OWN_PROFILES).read_text() if path is None else path.read_text()
        return _File.model_validate(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TimingsInvalid(f"{shown} cannot be read: {type(error).__name__}") from None
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()[:5]
        )
        raise TimingsInvalid(f"{shown}: {faults}") from None
