"""The kit runs every part here too, narrow, and says of each bar whether it was met, missed or not run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from serve_app.bench.machine.bars import BARS, Bar
from serve_app.bench.machine.gpu_kit import Kit, Part, _verdict, run_kit
from serve_app.bench.measuring.options import Device

LIMIT = Bar("start", "figure", "at most", 1.5)


@pytest.mark.parametrize(
    ("part", "is_on_gpu", "outcome"),
    [
        (Part("start", 1.0, {"figure": 1.5}), True, "met"),
        (Part("start", 1.0, {"figure": 1.6}), True, "missed"),
        (Part("start", 1.0, {"figure": 1.6}), False, "not held against the bar: no GPU"),
        (Part("start", 1.0, {}, error="no time was left"), True, "not run: no time was left"),
        (None, True, "not run"),
    ],
)
def test_a_bar_is_met_or_missed_or_not_run(part: Part | None, outcome: str, *, is_on_gpu: bool) -> None:
    assert _verdict(LIMIT, part, is_on_gpu=is_on_gpu).outcome == outcome


def test_every_bar_belongs_to_a_part() -> None:
    assert {bar.part for bar in BARS} == Kit(Device.CPU).parts().keys()


@pytest.mark.slow
def test_a_part_runs_narrow_and_is_reported() -> None:
    report = run_kit(["swap sd15"], limit_s=300.0, device=Device.CPU)
    (part,) = report.parts
    assert part.error is None
    assert {bar.figure for bar in BARS if bar.part == "swap sd15"} <= part.figures.keys()
    outcomes = {one.bar.figure: one.outcome for one in report.verdicts if one.bar.part == "swap sd15"}
    assert outcomes["fused weights with other bits than diffusers'"] == outcomes["base restored"] == "met"
    assert "loraplex bench swap --model sd15" in report.to_markdown()
    assert json.loads(report.to_json())["parts"][0]["name"] == "swap sd15"


def test_what_no_time_is_left_for_is_not_run() -> None:
    report = run_kit(["start"], limit_s=-1.0, device=Device.CPU)
    assert report.parts[0].error == "no time was left"


def test_the_kit_needs_neither_ray_nor_a_web_framework() -> None:
    program = "import sys, serve_app.bench.machine.gpu_kit as kit; sys.exit(bool({'ray', 'fastapi'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", program], timeout=240).returncode == 0
