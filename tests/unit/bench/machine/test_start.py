import json
from functools import cache

import pytest

from serve_app.bench.machine.start import StartStep, run_start
from serve_app.bench.measuring.memory import check_room
from serve_app.bench.measuring.options import BenchmarkRefused, StartOptions
from serve_app.bench.measuring.report import StartReport


@cache
def tiny_report() -> StartReport:
    return run_start(StartOptions(repeats=1))


def test_every_step_of_a_start_is_measured() -> None:
    report = tiny_report()
    assert [row.step for row in report.rows] == list(StartStep)
    assert all(row.wall_ms > 0 and row.cpu_ms >= 0 for row in report.rows)
    read, load, touch = (report.row(step) for step in (StartStep.READ, StartStep.LOAD_BASE, StartStep.TOUCH))
    assert read is not None
    assert load is not None
    assert touch is not None
    assert report.ready.wall_ms == pytest.approx(load.wall_ms + touch.wall_ms)
    assert report.ready_over_read_wall == pytest.approx(report.ready.wall_ms / read.wall_ms)


def test_the_file_holds_every_parameter_in_the_dtype_asked_for() -> None:
    report = tiny_report()
    header = report.file_bytes - 2 * report.parameters
    assert 0 < header < report.file_bytes / 10


def test_loading_initialises_nothing() -> None:
    assert tiny_report().drawn_by_load == 0


def test_the_report_of_a_start_as_json_says_what_was_run_on_what() -> None:
    report = json.loads(tiny_report().to_json())
    assert report["schema"] == 1
    assert report["command"] == "loraplex bench start --model tiny --dtype bfloat16 --repeat 1 --seed 0 --threads 1"
    assert report["machine"]["threads"] == 1
    assert report["ready_over_read_wall"] > 0


def test_a_start_that_does_not_fit_is_refused_with_what_it_needs() -> None:
    with pytest.raises(BenchmarkRefused, match=r"flux in float32 needs about 9\.0 GB of disk, but 1\.0 GB is free"):
        check_room("flux in float32", 9 * 10**9, 10**9, "disk")
