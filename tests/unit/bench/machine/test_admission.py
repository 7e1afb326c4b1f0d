import json
from functools import cache

import pytest

from serve_app.bench.machine.admission import run_admission
from serve_app.bench.measuring.options import AdmissionOptions
from serve_app.bench.measuring.report import AdmissionReport

OPTIONS = AdmissionOptions(rank=4, repeats=2, steps=2, latent=8)


@cache
def tiny_report() -> AdmissionReport:
    return run_admission(OPTIONS)


def test_both_spellings_are_admitted_and_read_back() -> None:
    report = tiny_report()
    assert [row.spelling for row in report.rows] == ["diffusers", "kohya"]
    for row in report.rows:
        assert row.file_bytes > 0
        assert row.admit_wall_ms > 0
        assert row.read_wall_ms > 0
        assert row.ready_wall_ms >= row.admit_wall_ms
        assert row.ready_cpu_ms == pytest.approx(row.child_cpu_ms + row.read_cpu_ms)


def test_each_pair_of_alone_and_beside_had_admissions_beside() -> None:
    beside = tiny_report().beside
    assert len(beside.slowdowns) == OPTIONS.repeats
    assert beside.admitted >= OPTIONS.repeats
    assert min(beside.slowdowns) <= beside.slowdown <= max(beside.slowdowns)
    assert min(beside.alone_ms, beside.beside_ms) > 0


def test_the_report_of_admissions_as_json_says_what_was_run_on_what() -> None:
    report = json.loads(tiny_report().to_json())
    assert report["schema"] == 1
    assert report["command"].startswith("loraplex bench admission --model tiny --dtype bfloat16 --rank 4 --repeat 2")
    assert report["layers"] == 32
    assert {"processor", "load_average"} <= report["machine"].keys()
