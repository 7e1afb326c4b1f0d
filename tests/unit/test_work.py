"""What a request weighs, and how the pace follows what was measured."""

from __future__ import annotations

import dataclasses

import pytest

from serve_app.core import GenerationRequest, PixelImage
from serve_app.work import MOST_GROWTH, NEWEST_WEIGHT, LatencyEstimator, LatencyModel, work_units

REQUEST = GenerationRequest(
    request_id="r", base_id="b", prompt="p", negative_prompt=None, adapters=(), width=1000, height=500, steps=20,
    guidance_scale=7.5, scheduler=None, seed=1, num_images=3,
)  # fmt: skip


def test_work_grows_with_images_steps_pixels_and_guidance() -> None:
    assert work_units(REQUEST) == pytest.approx(3 * 20 * 0.5 * 2)
    assert work_units(dataclasses.replace(REQUEST, guidance_scale=1.0)) == pytest.approx(3 * 20 * 0.5)


def test_work_of_image_to_image_counts_only_the_steps_that_run() -> None:
    image = PixelImage(1, 1, b"\0\0\0")
    request = dataclasses.replace(REQUEST, image=image, strength=0.25)
    assert work_units(request) == pytest.approx(work_units(REQUEST) / 4)


def test_the_first_passes_replace_the_guess_by_their_mean_and_later_ones_move_it() -> None:
    meter = LatencyEstimator(LatencyModel(fixed_s=9.0, unit_s=9.0))
    meter.observe(units=10, denoise_s=5.0, other_s=0.1)
    assert meter.pace == LatencyModel(fixed_s=0.1, unit_s=0.5)
    for _ in range(4):
        meter.observe(units=10, denoise_s=15.0, other_s=0.1)
    assert meter.pace.unit_s == pytest.approx((0.5 + 4 * 1.5) / 5)
    for _ in range(4):
        meter.observe(units=10, denoise_s=15.0, other_s=0.1)
    assert meter.pace.unit_s == pytest.approx(1.5 - (1 - NEWEST_WEIGHT) ** 4 * 0.2)
    assert meter.pace.seconds(2) == pytest.approx(0.1 + 2 * meter.pace.unit_s)


def test_a_stall_counts_as_a_slow_pass_and_a_device_that_became_slow_is_known_after_a_few() -> None:
    meter = LatencyEstimator(LatencyModel(fixed_s=9.0, unit_s=9.0))
    for _ in range(5):
        meter.observe(units=10, denoise_s=10.0, other_s=1.0)
    meter.observe(units=10, denoise_s=300.0, other_s=30.0)
    assert meter.pace.seconds(10) == pytest.approx(11 * (1 + NEWEST_WEIGHT * (MOST_GROWTH - 1)))
    for _ in range(15):
        meter.observe(units=10, denoise_s=100.0, other_s=10.0)
    assert meter.pace.seconds(10) == pytest.approx(110, rel=0.1)


@pytest.mark.parametrize(("units", "denoise_s", "other_s"), [(0, 1, 1), (1, float("nan"), 1), (1, 1, float("inf"))])
def test_a_pass_that_says_nothing_changes_nothing(units: float, denoise_s: float, other_s: float) -> None:
    meter = LatencyEstimator(LatencyModel(1.0, 2.0))
    meter.observe(units=units, denoise_s=denoise_s, other_s=other_s)
    assert meter.pace == LatencyModel(1.0, 2.0)
