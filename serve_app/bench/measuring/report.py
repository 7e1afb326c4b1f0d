"""The outcome of a benchmark, as values and as JSON.

Owns what is reported, and the ratios, which are worked out here alone. Must not import torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.bench.measuring.options import AdmissionOptions, PipelineOptions, StartOptions, SwapOptions

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One step's medians; `device_ms` is None on a CPU."""

    step: str
    wall_ms: float
    cpu_ms: float
    device_ms: float | None


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of the measurement; `load_average` is the last minute's, of the whole machine, at the start."""

    processor: str
    cores: int
    threads: int
    memory_gb: float
    load_average: float
    accelerator: str | None
    system: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model built: `touched` counts layers that an adapter changes; `factor_bytes` are one adapter's."""

    source: str
    parameters: int
    base_bytes: int
    touched: int
    touched_bytes: int
    factor_bytes: int


@dataclass(frozen=True, slots=True)
class Floor:
    """The machine's rates, and the least time of a swap by each; `swap_ms` is the largest of those."""

    copied_gb_per_s: float
    multiplied_gflop_per_s: float
    bus_gb_per_s: float | None
    rewrite_ms: float
    products_ms: float
    bus_ms: float | None
    swap_ms: float


@dataclass(frozen=True, slots=True)
class Exactness:
    """The comparisons to the bit; `fused_equal` is None without a baseline.

    `weights_compared` counts fused weights over all repeats, each against a fresh base with diffusers' load and fuse.
    """

    fused_equal: bool | None
    weights_compared: int
    weights_unequal: tuple[str, ...]
    base_restored: bool


@dataclass(frozen=True, slots=True)
class Rate:
    """Images per second, and as a share of those of a stream that keeps its adapter, by both clocks."""

    images_per_s: float
    of_steady: float
    of_steady_cpu: float


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of requests: one adapter throughout, another one for each, and that prepared during the image before.

    `hotswap` and `four_calls` are diffusers' ways of changing to another one for each, without and with fusing.
    """

    steps: int
    latent: int
    batch: int
    steady: Rate
    changing: Rate
    prepared: Rate | None
    hotswap: Rate | None
    four_calls: Rate | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: before the base was built, at the peak of our own way, and at the end with the baseline's.

    `expected_bytes` are the base, the fused copies of the touched weights and two adapters.
    """

    before_bytes: int
    peak_bytes: int
    end_peak_bytes: int
    expected_bytes: int


@dataclass(frozen=True, slots=True)
class Ratios:
    """Diffusers' four calls over our swap, and ours over the floor."""

    diffusers_over_swap_wall: float | None
    diffusers_over_swap_cpu: float | None
    diffusers_over_calls_cpu: float | None
    diffusers_over_unseen_wall: float | None
    swap_over_floor_wall: float
    swap_over_floor_cpu: float


@dataclass(frozen=True, slots=True)
class SwapReport:
    """Everything that one run found."""

    command: str
    date: str
    options: SwapOptions
    machine: Machine
    sizes: Sizes
    rows: tuple[Row, ...]
    four_calls: Row | None
    unseen: Row
    floor: Floor
    ratios: Ratios
    exactness: Exactness
    stream: Stream
    memory: Memory

    def row(self, step: str) -> Row | None:
        """Return a step's row, or None where it was not run."""
        return next((row for row in self.rows if row.step == step), None)

    def to_json(self) -> str:
        """Return the report as indented JSON; `schema` changes when a name in it does."""
        return _as_json(self)


@dataclass(frozen=True, slots=True)
class StartReport:
    """The time of loading a denoiser beside that of reading its file.

    `ready_over_read` is a load with every page touched over the pass through the file's bytes before it, by either
    clock: the median of the rounds' own ratios. `drawn_by_load` counts random values that were drawn into memory:
    parameters that are initialised.
    """

    command: str
    date: str
    options: StartOptions
    machine: Machine
    source: str
    parameters: int
    file_bytes: int
    rows: tuple[Row, ...]
    ready: Row
    ready_over_read_wall: float
    ready_over_read_cpu: float
    drawn_by_load: int

    def row(self, step: str) -> Row | None:
        """Return a step's row, or None where it was not run."""
        return next((row for row in self.rows if row.step == step), None)

    def gb_per_s(self, row: Row) -> float:
        """Return the rate at which a step went through the file."""
        return self.file_bytes / row.wall_ms / 1e6

    def to_json(self) -> str:
        """Return the report as indented JSON; `schema` changes when a name in it does."""
        return _as_json(self)


@dataclass(frozen=True, slots=True)
class AdmissionRow:
    """One spelling's way from a file to host memory: medians, but for the child's time, which is a mean.

    `admit` is the child's work as the parent waits for it, `read` the canonical file's way into host memory.
    """

    spelling: str
    file_bytes: int
    admit_wall_ms: float
    child_cpu_ms: float
    read_wall_ms: float
    read_cpu_ms: float
    ready_wall_ms: float
    ready_cpu_ms: float


@dataclass(frozen=True, slots=True)
class InterferenceReport:
    """A generation in the parent, in turn alone and while files are admitted one after another without a pause.

    `slowdowns` are the rounds' own ratios of median step times on the wall; `slowdown` is their median, and
    `slowdown_cpu` that of the generating thread's processor time, which leaves out waiting for a core. Those of `busy`
    are the same beside a process that only counts: the cost of any second busy core on this machine.
    """

    steps: int
    alone_ms: float
    beside_ms: float
    slowdowns: tuple[float, ...]
    slowdown: float
    slowdown_cpu: float
    slowdown_busy: float
    slowdown_busy_cpu: float
    admitted: int


@dataclass(frozen=True, slots=True)
class AdmissionReport:
    """The time of admitting a new file, and its cost to the images that are drawn meanwhile."""

    command: str
    date: str
    options: AdmissionOptions
    machine: Machine
    source: str
    layers: int
    rows: tuple[AdmissionRow, ...]
    beside: InterferenceReport
    load_after: float

    def to_json(self) -> str:
        """Return the report as indented JSON; `schema` changes when a name in it does."""
        return _as_json(self)


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """Two ways to do the same work, in turn: medians, and of the pairs' own ratios the median and the extremes.

    Times are the processor's on a CPU and the wall's on a GPU. `largest_difference` is between the two results, of
    values around one; 0 says that they are equal to the last bit. Peaks are torch's allocations, None on a CPU.
    """

    subject: str
    choice: str
    usual: str
    other: str
    usual_ms: float
    other_ms: float
    ratio: float
    ratios: tuple[float, float]
    largest_difference: float
    usual_peak_bytes: int | None
    other_peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class WaitRow:
    """How often the host asks for a value that is worked out on the device, with one noise scheduler: it waits then.

    Waits for a GPU, that is: on a CPU they cost nothing, but are the same.
    """

    scheduler: str
    waits_per_step: float


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """The effect of each choice in a pipeline's set-up."""

    command: str
    date: str
    options: PipelineOptions
    machine: Machine
    load_after: float
    rows: tuple[ChoiceRow, ...]
    waits: tuple[WaitRow, ...]

    def to_json(self) -> str:
        """Return the report as indented JSON; `schema` changes when a name in it does."""
        return _as_json(self)


def _as_json(report: SwapReport | StartReport | AdmissionReport | PipelineReport) -> str:
    fields: dict[str, Any] = {"schema": SCHEMA, **dataclasses.asdict(report)}
    return json.dumps(fields, indent=2) + "\n"
