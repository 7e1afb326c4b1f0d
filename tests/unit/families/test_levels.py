"""Steps of any number, noise levels of any kind: each scheduler draws them, or they are refused before the device."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import DDIMScheduler

from serve_app.core import PipelineOptions
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import BadRequest
from tests.family_cases import asked, drawn, served, served_as
from tests.service import EMBEDDED
from tests.tiny_families.build import tiny_family

# A base for each kind of prediction: noise, v, a flow with a fixed shift, a flow shifted by the size.
KINDS = ("sd15", pytest.param("sd21", marks=pytest.mark.slow), "sd3", "flux_dev")
FEW, MORE = (1, 5), (2, 3, 12)
LEVELS: dict[str, tuple[Any, ...]] = {
    "timesteps": ((0,), (0, 0), (999,), (999, 999), (10**9, 1), (1, 999), (999, 500, 1)),
    "sigmas": ((0.0,), (0.0, 0.0), (1.0,), (1e30,), (0.1, 1.0), (14.0, 5.0, 1.0), (1.0, 0.5, 0.1), (3.4e38, 1.0)),
}


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest) -> BasePipeline:
    return served(request.param)


def outcome(pipeline: BasePipeline, **given: Any) -> bool:
    """Draw a request that passes `check`, and say whether it does; what fails after it is a fault."""
    wanted = asked(pipeline.tasks[0], **{"guidance_scale": 1.0, "width": 32, "height": 32, **given})
    try:
        pipeline.check(wanted)
    except BadRequest:
        return False
    return drawn(pipeline, wanted)[0].width == 32


@pytest.mark.parametrize("numbers", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_a_scheduler_on_offer_draws_any_number_of_steps_or_says_how_many_it_needs(
    pipeline: BasePipeline, numbers: tuple[int, ...]
) -> None:
    for name in pipeline.schedulers():
        drawn_numbers = [steps for steps in numbers if outcome(pipeline, scheduler=name, steps=steps)]
        assert numbers[-1] in drawn_numbers, name


@pytest.mark.parametrize("level", LEVELS)
def test_levels_that_a_scheduler_cannot_run_are_refused_before_the_device(pipeline: BasePipeline, level: str) -> None:
    takes = level in pipeline.parameters(pipeline.tasks[0])
    drawn_levels = [
        values
        for name in pipeline.schedulers()
        if name.endswith("Scheduler")  # the others are some of these with options that levels replace
        for values in LEVELS[level]
        if outcome(pipeline, scheduler=name, steps=len(values), options=PipelineOptions(**{level: values}))
    ]
    assert bool(drawn_levels) == takes


def test_more_layers_than_the_text_encoder_has_are_not_skipped() -> None:
    pipeline = served("sdxl")
    assert [skipped for skipped in range(5) if outcome(pipeline, options=PipelineOptions(clip_skip=skipped))] == [0, 1]


def test_a_base_trained_to_pure_noise_offers_and_draws_only_what_stays_finite() -> None:
    live: Any = tiny_family("sd15")
    live.scheduler = DDIMScheduler.from_pretrained(EMBEDDED / "demo" / "sd15" / "scheduler")
    pipeline = served_as(live)
    assert "DPM2 Karras" in served("sd15").schedulers()
    assert "DPM2 Karras" not in pipeline.schedulers()
    numbers = (3, 4, 7, 12)
    refused = {
        name: [steps for steps in numbers if not outcome(pipeline, scheduler=name, steps=steps)]
        for name in ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
    }
    assert refused == {"EulerAncestralDiscreteScheduler": [3], "KDPM2AncestralDiscreteScheduler": [3, 4, 7]}
