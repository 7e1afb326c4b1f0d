import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from serve_app.bench.machine.baseline import DiffusersBaseline
from serve_app.bench.machine.swap import differing, run_swap
from serve_app.bench.measuring.memory import check_memory
from serve_app.bench.measuring.options import Baseline, BenchmarkRefused, Device, DType, Model, SwapOptions, Targets
from serve_app.bench.measuring.report import SwapReport
from serve_app.bench.measuring.timing import Step
from serve_app.bench.models.adapter_files import write_adapter_files
from serve_app.bench.models.denoisers import fill_outline, outline_of

OPTIONS = SwapOptions(rank=4, repeats=2, steps=1)
GPU_STEPS = {Step.SWAP_RESIDENT}
FOUR_CALLS = {Step.LOAD, Step.FUSE, Step.UNFUSE, Step.UNLOAD}
DIFFUSERS_STEPS = {*FOUR_CALLS, Step.HOTSWAP, Step.SET_ADAPTERS, Step.HOTSWAP_IMAGE, Step.FOUR_CALLS_IMAGE}


@cache
def tiny_report() -> SwapReport:
    return run_swap(OPTIONS)


def test_every_step_of_both_ways_is_measured() -> None:
    report = tiny_report()
    assert {row.step for row in report.rows} == set(Step) - GPU_STEPS
    assert all(row.wall_ms > 0 and row.cpu_ms >= 0 and row.device_ms is None for row in report.rows)
    four = [row.wall_ms for row in report.rows if row.step in FOUR_CALLS]
    assert report.four_calls is not None
    assert report.four_calls.wall_ms == pytest.approx(sum(four))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        replace(OPTIONS, repeats=1, dtype=DType.FLOAT32, targets=Targets.ALL),
        replace(OPTIONS, repeats=1, dtype=DType.FLOAT16, targets=Targets.LINEAR, seed=3),
    ],
    ids=lambda options: f"{options.dtype}-{options.targets}",
)
def test_fused_weights_equal_those_of_diffusers_and_the_base_comes_back(options: SwapOptions) -> None:
    exactness = run_swap(options).exactness
    assert exactness.fused_equal is True
    assert exactness.weights_compared > 0
    assert exactness.base_restored


def test_fused_weights_are_compared_once_for_each_touched_layer_and_repeat() -> None:
    report = tiny_report()
    assert report.exactness.fused_equal is True
    # Once as applied, and once as prepared and bound.
    assert report.exactness.weights_compared == 2 * report.sizes.touched * OPTIONS.repeats


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0}),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}),
    ],
    ids=["another value", "missing", "too many"],
)
def test_a_weight_that_differs_or_that_only_one_changed_is_named(
    theirs: dict[str, float], ours: dict[str, float]
) -> None:
    first, second = ({name: torch.tensor([value]) for name, value in side.items()} for side in (theirs, ours))
    assert differing(first, second) == ["b"]
    assert differing(first, first) == []


def test_without_a_baseline_nothing_is_compared_and_no_ratio_to_it_is_given_and_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report = run_swap(replace(OPTIONS, baseline=Baseline.NONE, repeats=1, threads=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert not DIFFUSERS_STEPS & {row.step for row in report.rows}
    assert report.exactness.fused_equal is None
    assert report.four_calls is None
    assert report.ratios.diffusers_over_swap_cpu is None
    assert report.stream.hotswap is report.stream.four_calls is None


def test_without_preparing_one_copy_of_the_touched_weights_is_expected() -> None:
    report = run_swap(replace(OPTIONS, baseline=Baseline.NONE, repeats=1, is_preparing=False))
    assert not {Step.PREPARE, Step.BIND, Step.PREPARED_IMAGE} & {row.step for row in report.rows}
    assert report.stream.prepared is None
    with_both = tiny_report().memory.expected_bytes
    assert with_both - report.memory.expected_bytes == report.sizes.touched_bytes
    assert "--no-prepare" in report.command


@pytest.mark.slow
def test_the_transformer_of_flux_runs_narrow() -> None:
    report = run_swap(SwapOptions(model=Model.FLUX, is_narrow=True, rank=2, repeats=1, steps=1, baseline=Baseline.NONE))
    assert report.sizes.touched == 266
    assert report.row(Step.READ_KOHYA) is None


def test_the_floor_is_the_slowest_of_its_parts() -> None:
    floor = tiny_report().floor
    assert floor.bus_ms is None
    assert floor.swap_ms == max(floor.rewrite_ms, floor.products_ms) > 0


def test_the_report_as_json_says_what_was_run_on_what() -> None:
    report = json.loads(tiny_report().to_json())
    assert report["schema"] == 1
    assert report["command"].startswith("loraplex bench swap --model tiny --device cpu --dtype bfloat16 --rank 4")
    assert report["options"]["seed"] == 0
    assert {"torch", "diffusers", "peft"} <= report["machine"]["versions"].keys()
    assert {"processor", "cores", "threads", "memory_gb", "load_average"} <= report["machine"].keys()
    assert {"images_per_s", "of_steady", "of_steady_cpu"} == report["stream"]["prepared"].keys()
    assert report["memory"]["peak_bytes"] >= report["memory"]["before_bytes"] > 0
    assert set(report["ratios"]) == {
        "diffusers_over_swap_wall",
        "diffusers_over_swap_cpu",
        "diffusers_over_calls_cpu",
        "diffusers_over_unseen_wall",
        "swap_over_floor_wall",
        "swap_over_floor_cpu",
    }


def test_a_run_that_does_not_fit_is_refused_with_what_it_needs() -> None:
    sizes = {"touched_bytes": 5 * 10**15, "factor_bytes": 10**9, "largest_weight": 10**6}
    with pytest.raises(BenchmarkRefused, match=r"flux in bfloat16 .* needs about 1\d{7}\.\d GB .* is free"):
        check_memory(SwapOptions(model=Model.FLUX), base_bytes=5 * 10**15, **sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(BenchmarkRefused, match="no CUDA device"):
        run_swap(replace(OPTIONS, device=Device.CUDA))


def test_the_baseline_writes_the_base_it_works_on(tmp_path: Path) -> None:
    outline = outline_of(OPTIONS)
    files = write_adapter_files(outline, OPTIONS, tmp_path)
    shapes = outline.targets(OPTIONS.targets)
    denoiser = fill_outline(outline, OPTIONS)
    baseline = DiffusersBaseline(denoiser)
    baseline.load(files.first)
    baseline.fuse()
    fused = baseline.fused()
    assert fused.keys() == {f"{name}.weight" for name in shapes}
    baseline.unfuse()
    baseline.unload()
    assert denoiser.changed(fused)  # it drifts, which is why it is refilled
