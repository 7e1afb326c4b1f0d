import json
from functools import cache

import pytest

from serve_app.bench.machine.pipeline import run_pipeline
from serve_app.bench.measuring.options import PipelineOptions
from serve_app.bench.measuring.report import PipelineReport

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1200)]

OPTIONS = PipelineOptions(size=64, steps=1, repeats=1, vae_sides=(64,))


@cache
def tiny_report() -> PipelineReport:
    return run_pipeline(OPTIONS)


def differences(choice: str) -> list[float]:
    return [row.largest_difference for row in tiny_report().rows if row.choice == choice]


def test_every_choice_is_measured_both_ways_on_every_subject() -> None:
    rows = tiny_report().rows
    assert {row.choice for row in rows if row.subject == "demo/sdxl"} == {
        "memory format",
        "attention",
        "decoding of 4 images",
        "decoding",
        "4 equal prompts, encoded",
        "4 different prompts, encoded",
    }
    assert {row.choice for row in rows if row.subject == "narrow SDXL UNet"} == {"memory format", "attention"}
    for row in rows:
        assert min(row.usual_ms, row.other_ms) > 0
        assert row.ratios[0] <= row.ratio <= row.ratios[1]


def test_what_changes_the_picture_shows_and_what_does_not_does_not() -> None:
    assert min(differences("decoding")) > 1e-3  # tiles
    assert max(differences("memory format") + differences("attention")) < 1e-3


def test_the_waits_of_the_schedulers_are_counted() -> None:
    waits = {wait.scheduler: wait.waits_per_step for wait in tiny_report().waits}
    assert len(waits) > 10
    assert waits["DDIMScheduler"] > waits["EulerDiscreteScheduler"] >= 0


def test_the_report_of_a_pipeline_as_json_says_what_was_run_on_what() -> None:
    report = json.loads(tiny_report().to_json())
    assert report["command"].startswith("loraplex bench pipeline --device cpu --dtype float32 --size 64")
    assert {"processor", "load_average"} <= report["machine"].keys()
