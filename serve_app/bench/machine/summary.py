"""From measurements to a report: sums, ratios and rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from serve_app.bench.machine.stream import ImageSteps
from serve_app.bench.measuring.options import Baseline, SwapOptions
from serve_app.bench.measuring.report import (
    Exactness,
    Floor,
    Machine,
    Memory,
    Rate,
    Ratios,
    Row,
    Sizes,
    Stream,
    SwapReport,
)
from serve_app.bench.measuring.timing import Step, Timing

FOUR_CALLS = (Step.LOAD, Step.FUSE, Step.UNFUSE, Step.UNLOAD)
UNSEEN = (Step.READ, Step.WRITE_CANONICAL, Step.READ_CANONICAL, Step.SWAP)
Medians = Mapping[Step, Timing]


def summarise(
    options: SwapOptions,
    machine: Machine,
    sizes: Sizes,
    *,
    medians: Medians,
    floor: Floor,
    exactness: Exactness,
    images: ImageSteps,
    memory: Memory,
) -> SwapReport:
    """Put a run's findings together."""
    four = _sum(medians, FOUR_CALLS) if options.baseline is Baseline.DIFFUSERS else None
    return SwapReport(
        command=options.command(),
        date=datetime.now(UTC).date().isoformat(),
        options=options,
        machine=machine,
        sizes=sizes,
        rows=tuple(_row(step, timing) for step, timing in medians.items()),
        four_calls=None if four is None else _row("diffusers.four_calls", four),
        unseen=_row("loraplex.unseen", _sum(medians, UNSEEN)),
        floor=floor,
        ratios=_ratios(medians, four, floor),
        exactness=exactness,
        stream=_stream(images, medians),
        memory=memory,
    )


def _ratios(medians: Medians, four: Timing | None, floor: Floor) -> Ratios:
    swap, unseen = medians[Step.SWAP], _sum(medians, UNSEEN)
    return Ratios(
        diffusers_over_swap_wall=None if four is None else four.wall_ms / swap.wall_ms,
        diffusers_over_swap_cpu=None if four is None else four.cpu_ms / swap.cpu_ms,
        diffusers_over_calls_cpu=None if four is None else four.cpu_ms / medians[Step.CALLS].cpu_ms,
        diffusers_over_unseen_wall=None if four is None else four.wall_ms / unseen.wall_ms,
        swap_over_floor_wall=swap.wall_ms / floor.swap_ms,
        swap_over_floor_cpu=swap.cpu_ms / floor.swap_ms,
    )


def _stream(images: ImageSteps, medians: Medians) -> Stream:
    steady = medians[Step.STEADY_IMAGE]

    def rate(timing: Timing) -> Rate:
        return Rate(1e3 / timing.wall_ms, steady.wall_ms / timing.wall_ms, steady.cpu_ms / timing.cpu_ms)

    def rate_if_run(step: Step) -> Rate | None:
        return rate(medians[step]) if step in medians else None

    return Stream(
        steps=images.steps,
        latent=images.latent,
        batch=images.batch,
        steady=rate(steady),
        changing=rate(medians[Step.CHANGING_IMAGE]),
        prepared=rate_if_run(Step.PREPARED_IMAGE),
        hotswap=rate_if_run(Step.HOTSWAP_IMAGE),
        four_calls=rate_if_run(Step.FOUR_CALLS_IMAGE),
    )


def _sum(medians: Medians, steps: Iterable[Step]) -> Timing:
    first, *rest = [medians[step] for step in steps]
    for timing in rest:
        first += timing
    return first


def _row(step: str, timing: Timing) -> Row:
    return Row(str(step), timing.wall_ms, timing.cpu_ms, timing.device_ms)
