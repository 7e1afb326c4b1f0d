"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from serve_app.bench.measuring.report import AdmissionReport, Machine, PipelineReport, Row, StartReport, SwapReport

LABELS = {
    "diffusers.load_lora_weights": "diffusers  load_lora_weights",
    "diffusers.fuse_lora": "diffusers  fuse_lora",
    "diffusers.unfuse_lora": "diffusers  unfuse_lora",
    "diffusers.unload_lora_weights": "diffusers  unload_lora_weights",
    "diffusers.hotswap": "diffusers  load_lora_weights(hotswap=True)",
    "diffusers.set_adapters": "diffusers  set_adapters, two resident",
    "diffusers.four_calls": "diffusers  the four calls",
    "loraplex.read": "loraplex   read and check an original file",
    "loraplex.read_kohya": "loraplex   the same, kohya's keys",
    "loraplex.write_canonical": "loraplex   write the canonical file",
    "loraplex.read_canonical": "loraplex   read the canonical file",
    "loraplex.to_device": "loraplex   host to device",
    "loraplex.first_swap": "loraplex   base -> A, the first of the process",
    "loraplex.apply": "loraplex   base -> A, from host memory",
    "loraplex.prepare": "loraplex   A -> B prepared: ahead, during an image",
    "loraplex.bind": "loraplex   A -> B prepared: what is left to do",
    "loraplex.swap": "loraplex   A -> B, from host memory",
    "loraplex.swap_resident": "loraplex   A -> B, from device memory",
    "loraplex.calls": "loraplex   A -> B, a GPU's calls alone",
    "loraplex.restore": "loraplex   B -> base",
    "loraplex.unseen": "loraplex   a file never seen, to its weights",
    "stream.image_without_change": "stream     an image, the last one's adapter",
    "stream.image_with_change": "stream     an image, another adapter",
    "stream.image_with_prepared_change": "stream     an image, another adapter, prepared",
    "stream.image_with_hotswap": "stream     an image, another adapter, hotswap",
    "stream.image_with_four_calls": "stream     an image, another adapter, four calls",
}
START_LABELS = {
    "file.read": "read the file's bytes, through 8 MiB",
    "loraplex.load_base": "load_base",
    "loraplex.touch": "touch every page of its weights",
    "loraplex.checksums": "slabs and checksums instead, as a replica does",
    "loraplex.ready": "ready: load_base and touch",
}
UNRATED = ("loraplex.touch",)


def render(report: SwapReport) -> Group:
    """Return the whole report."""
    options, sizes = report.options, report.sizes
    width = "narrow " if options.is_narrow else ""
    heading = Text(
        f"{width}{options.model} ({sizes.source})\n"
        f"{sizes.parameters / 1e6:.1f} M parameters in {options.dtype}; rank {options.rank} on {sizes.touched} layers "
        f"({sizes.touched_bytes / 1e6:.1f} MB of weights, {sizes.factor_bytes / 1e6:.1f} MB of factors)\n"
        f"{_machine(report.machine)}"
    )
    return Group(heading, _steps(report), _findings(report))


def render_start(report: StartReport) -> Group:
    """Return the whole report of a start."""
    options = report.options
    heading = Text(
        f"{options.model} ({report.source})\n{report.parameters / 1e6:.1f} M parameters in {options.dtype}, "
        f"a file of {report.file_bytes / 1e9:.3g} GB in the page cache\n{_machine(report.machine)}"
    )
    table = Table(title=f"medians of {options.repeats} rounds", title_justify="left")
    table.add_column("step")
    for clock in ("wall, s", "CPU, s", "GB/s"):
        table.add_column(clock, justify="right", no_wrap=True)
    for row in (*report.rows, report.ready):
        rate = "" if row.step in UNRATED else f"{report.gb_per_s(row):.2f}"
        style = "bold" if row is report.ready else None
        table.add_row(START_LABELS[row.step], f"{row.wall_ms / 1e3:.3f}", f"{row.cpu_ms / 1e3:.3f}", rate, style=style)
    ratio = f"{report.ready_over_read_wall:.2f} wall, {report.ready_over_read_cpu:.2f} processor time"
    facts = (("ready / reading the bytes", ratio), ("random values drawn", str(report.drawn_by_load)))
    return Group(heading, table, _facts(facts))


def render_admission(report: AdmissionReport) -> Group:
    """Return the whole report of admissions."""
    options, beside = report.options, report.beside
    heading = Text(
        f"{options.model} ({report.source}) in {options.dtype}; rank {options.rank} on {report.layers} layers\n"
        f"{_machine(report.machine)}"
    )
    table = Table(title=f"{options.repeats} interleaved repeats, ms", title_justify="left")
    table.add_column("file")
    for clock in ("admit, wall", "child's CPU", "read back, wall", "CPU", "ready, wall", "CPU"):
        table.add_column(clock, justify="right")
    for row in report.rows:
        times = (row.admit_wall_ms, row.child_cpu_ms, row.read_wall_ms, row.read_cpu_ms)
        cells = [f"{time:.1f}" for time in (*times, row.ready_wall_ms, row.ready_cpu_ms)]
        table.add_row(f"{row.spelling}, {row.file_bytes / 1e6:.1f} MB", *cells)
    spread = f"{min(beside.slowdowns):.3f} to {max(beside.slowdowns):.3f} over {len(beside.slowdowns)} rounds"
    steps = f"{beside.alone_ms:.2f} ms alone, {beside.beside_ms:.2f} ms beside {beside.admitted} admissions"
    facts = (
        ("a denoiser's step", steps),
        ("beside / alone", f"{beside.slowdown:.3f} wall, {spread}; {beside.slowdown_cpu:.3f} processor time"),
        ("busy core / alone", f"{beside.slowdown_busy:.3f} wall, {beside.slowdown_busy_cpu:.3f} processor time"),
        ("load average", f"{report.machine.load_average} at the start, {report.load_after} at the end"),
    )
    return Group(heading, table, _facts(facts))


def render_pipeline(report: PipelineReport) -> Group:
    """Return the whole report of a pipeline's choices."""
    options = report.options
    heading = Text(
        f"demo bases at {options.size} px, {options.steps} steps, {options.dtype}; "
        f"load {report.load_after} at the end\n{_machine(report.machine)}"
    )
    clock = "ms" if report.machine.accelerator is not None else "ms of processor time"
    table = Table(title=f"{options.repeats} interleaved pairs, {clock}", title_justify="left")
    for name in ("subject", "choice", "usual / other"):
        table.add_column(name)
    for name in ("usual", "other", "other / usual", "largest difference"):
        table.add_column(name, justify="right")
    for row in report.rows:
        ratio = f"{row.ratio:.2f} ({row.ratios[0]:.2f} to {row.ratios[1]:.2f})"
        times = (f"{row.usual_ms:.1f}", f"{row.other_ms:.1f}")
        ways = f"{row.usual} / {row.other}"
        table.add_row(row.subject, row.choice, ways, *times, ratio, f"{row.largest_difference:.1g}")
    waits = Table(title="the host's waits for the device in a step", title_justify="left")
    waits.add_column("scheduler")
    waits.add_column("waits", justify="right")
    for wait in report.waits:
        waits.add_row(wait.scheduler, f"{wait.waits_per_step:.2g}")
    return Group(heading, table, waits)


def _machine(machine: Machine) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return (
        f"{machine.accelerator or machine.processor}; {machine.cores} cores, torch on {machine.threads}, "
        f"load {machine.load_average}; {machine.system}\n{versions}"
    )


def _steps(report: SwapReport) -> Table:
    has_device = report.machine.accelerator is not None
    table = Table(title=f"medians of {report.options.repeats} interleaved repeats, ms", title_justify="left")
    table.add_column("step")
    for clock in ("wall", "CPU", "device")[: 3 if has_device else 2]:
        table.add_column(clock, justify="right", no_wrap=True)
    for row in _ordered(report):
        clocks = [row.wall_ms, row.cpu_ms, *([row.device_ms] if has_device else [])]
        cells = ["" if clock is None else f"{clock:.2f}" for clock in clocks]
        table.add_row(
            LABELS[row.step], *cells, style="bold" if row.step in ("loraplex.swap", "loraplex.bind") else None
        )
    return table


def _ordered(report: SwapReport) -> Iterator[Row]:
    for row in report.rows:
        yield row
        if row.step == "diffusers.unload_lora_weights" and report.four_calls is not None:
            yield report.four_calls
        if row.step == "loraplex.restore":
            yield report.unseen


def _findings(report: SwapReport) -> Table:
    return _facts((*_against_baseline(report), *_against_floor(report), *_others(report)))


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, finding in facts:
        table.add_row(name, finding)
    return table


def _against_baseline(report: SwapReport) -> Iterator[tuple[str, str]]:
    ratios, exactness = report.ratios, report.exactness
    if report.four_calls is not None:
        what = "almost all of it Python" if report.options.is_narrow else "arithmetic included"
        yield "four calls / swap", f"{ratios.diffusers_over_swap_wall:.1f} wall"
        yield "", f"{ratios.diffusers_over_swap_cpu:.1f} processor time ({what})"
        yield "four calls / calls alone", f"{ratios.diffusers_over_calls_cpu:.0f} processor time"
        yield "four calls / file never seen", f"{ratios.diffusers_over_unseen_wall:.1f} wall"
        equal = "yes" if exactness.fused_equal else f"NO: {', '.join(exactness.weights_unequal[:5])}"
        yield "bit-equal to load and fuse", f"{equal} ({exactness.weights_compared} weights compared)"
    yield "base bit-equal after restore", "yes" if exactness.base_restored else "NO"


def _against_floor(report: SwapReport) -> Iterator[tuple[str, str]]:
    floor = report.floor
    bus = f", bus {floor.bus_ms:.2f} ms at {floor.bus_gb_per_s:.1f} GB/s" if floor.bus_ms is not None else ""
    yield (
        "floor on this machine",
        f"{floor.swap_ms:.2f} ms: rewrite {floor.rewrite_ms:.2f} ms at {floor.copied_gb_per_s:.1f} GB/s, "
        f"products {floor.products_ms:.2f} ms at {floor.multiplied_gflop_per_s:.0f} GFLOP/s{bus}",
    )
    ratios = report.ratios
    yield (
        "swap / floor",
        f"{ratios.swap_over_floor_wall:.1f} wall, {ratios.swap_over_floor_cpu:.1f} processor time",
    )


def _others(report: SwapReport) -> Iterator[tuple[str, str]]:
    stream, memory = report.stream, report.memory
    size = f"{stream.steps} steps, latents {stream.latent}x{stream.latent}"
    yield "stream, images/s", f"{stream.steady.images_per_s:.3g} with one adapter throughout ({size})"
    ways = (
        ("a new adapter each", stream.changing),
        ("the same, prepared", stream.prepared),
        ("diffusers' hotswap for each, not fused", stream.hotswap),
        ("diffusers' four calls for each", stream.four_calls),
    )
    for what, rate in ways:
        if rate is not None:
            shares = f"{rate.of_steady:.1%} wall, {rate.of_steady_cpu:.1%} processor time"
            yield "", f"{rate.images_per_s:.3g} with {what} ({shares})"
    yield (
        "peak memory",
        f"{(memory.peak_bytes - memory.before_bytes) / 1e9:.2f} GB over the {memory.before_bytes / 1e9:.2f} GB before; "
        f"base, fused buffers and two adapters are {memory.expected_bytes / 1e9:.2f} GB",
    )
