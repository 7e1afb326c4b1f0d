from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import BaseModelConfig
from serve_app.core import (
    AdapterSpec,
    GenerationRequest,
    PipelineOptions,
    PixelImage,
    PixelMask,
    Scale,
    ScaledAdapter,
    Scales,
    UnresolvedRequest,
)
from serve_app.deployments.ingress.resolve_defaults import resolve_defaults
from serve_app.errors import BadRequest, MalformedRequest, OutOfBounds, UnknownScheduler
from serve_app.families.table import family_of

BASE = BaseModelConfig.model_validate(
    {
        "id": "one",
        "source": {"embedded": "one"},
        "defaults": {"steps": 12, "guidance_scale": 3.0, "width": 64, "height": 64},
        "limits": {"min_side": 32, "max_side": 128, "max_pixels": 128 * 96, "max_adapters": 2},
    }
)


def spec(name: str) -> AdapterSpec:
    return AdapterSpec(name, "one", "a" * 40, "f.safetensors", "folder", "/nowhere", 10)


def settled(draft: UnresolvedRequest, *uses: ScaledAdapter) -> GenerationRequest:
    return resolve_defaults(draft, BASE, uses, request_id="r", seed=99)


def test_what_is_not_asked_for_comes_from_the_base() -> None:
    request = settled(UnresolvedRequest("p"))
    assert (request.width, request.height, request.steps, request.guidance_scale) == (64, 64, 12, 3.0)
    assert request.seed == 99
    assert request.strength is None


def test_zero_is_an_answer_and_not_an_absence() -> None:
    request = settled(UnresolvedRequest("p", seed=0, guidance_scale=0.0))
    assert (request.seed, request.guidance_scale) == (0, 0.0)


def test_adapters_settle_in_one_order_whatever_the_order_asked() -> None:
    one, two = ScaledAdapter(spec("x/a"), 1.0), ScaledAdapter(spec("x/b"), 0.5)
    assert settled(UnresolvedRequest("p"), two, one) == settled(UnresolvedRequest("p"), one, two)


@pytest.mark.parametrize(
    ("draft", "name"),
    [
        (UnresolvedRequest("p", width=60), "width"),
        (UnresolvedRequest("p", height=8), "height"),
        (UnresolvedRequest("p", width=136), "width"),
        (UnresolvedRequest("p", width=128, height=128), "width x height"),
        (UnresolvedRequest("p", steps=0), "num_inference_steps"),
        (UnresolvedRequest("p", steps=101), "num_inference_steps"),
        (UnresolvedRequest("p", guidance_scale=-1.0), "guidance_scale"),
        (UnresolvedRequest("p", guidance_scale=float("nan")), "guidance_scale"),
        (UnresolvedRequest("p", num_images=5), "num_images_per_prompt"),
        (UnresolvedRequest("p", seed=-1), "seed"),
        (UnresolvedRequest("p", seed=2**63), "seed"),
        (UnresolvedRequest("p" * 10_001), "prompt"),
        (UnresolvedRequest("p", negative_prompt="p" * 10_001), "negative_prompt"),
        (UnresolvedRequest("p", image=PixelImage(1, 1, b"abc"), strength=0.0), "strength"),
        (UnresolvedRequest("p", image=PixelImage(1, 1, b"abc"), references=(PixelImage(1, 1, b"abc"),) * 4), "image"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(draft: UnresolvedRequest, name: str) -> None:
    with pytest.raises(OutOfBounds) as caught:
        settled(draft)
    assert caught.value.name == name


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_of_exactly_the_longest_length_is_taken(field: str) -> None:
    text = "p" * BASE.limits.max_prompt_characters
    assert getattr(settled(UnresolvedRequest(**{"prompt": "p", field: text})), field) == text


def test_too_many_adapters_are_refused() -> None:
    with pytest.raises(OutOfBounds, match="at most 2"):
        settled(UnresolvedRequest("p"), *(ScaledAdapter(spec(f"x/{name}"), 1.0) for name in "abc"))


@pytest.mark.parametrize("scale", [11.0, -11.0, float("nan"), float("inf"), Scales(1.0, 11.0), Scales(-11.0, 1.0)])
def test_an_absurd_adapter_scale_is_refused(scale: Scale) -> None:
    with pytest.raises(OutOfBounds, match="scale of x/a"):
        settled(UnresolvedRequest("p"), ScaledAdapter(spec("x/a"), scale))


def test_an_unknown_scheduler_is_refused_with_the_choices() -> None:
    with pytest.raises(UnknownScheduler, match="EulerDiscreteScheduler"):
        settled(UnresolvedRequest("p", scheduler="Eular"))


@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_any_input_picture_gets_a_size_the_base_can_draw_or_a_refusal(width: int, height: int) -> None:
    draft = UnresolvedRequest("p", image=PixelImage(width, height, b""))
    try:
        request = settled(draft)
    except OutOfBounds:
        assert max(width, height) / min(width, height) > 2
        return
    assert request.width % 8 == request.height % 8 == 0
    assert min(request.width, request.height) >= 32
    assert max(request.width, request.height) <= 128
    assert request.width * request.height <= 128 * 96


def test_a_picture_that_fits_keeps_its_size() -> None:
    request = settled(UnresolvedRequest("p", image=PixelImage(72, 96, b"")))
    assert (request.width, request.height, request.strength) == (72, 96, 0.8)


def test_what_is_masked_is_drawn_anew_unless_a_strength_says_otherwise() -> None:
    picture, mask = PixelImage(64, 64, b""), PixelMask(64, 64, b"")
    masked = settled(UnresolvedRequest("p", image=picture, mask=mask, num_previews=2))
    assert (masked.mask, masked.strength, masked.num_previews) == (mask, 1.0, 2)
    assert settled(UnresolvedRequest("p", image=picture, mask=mask, strength=0.5)).strength == 0.5


@pytest.mark.parametrize(("strength", "steps"), [(None, 12), (0.5, 6), (1.0, 12)])
def test_the_steps_to_come_are_those_that_the_strength_leaves(strength: float | None, steps: int) -> None:
    image = None if strength is None else PixelImage(64, 64, b"")
    assert settled(UnresolvedRequest("p", image=image, strength=strength)).planned_steps == steps


def settled_as(pipeline: str, draft: UnresolvedRequest) -> GenerationRequest:
    return resolve_defaults(draft, BASE, (), request_id="r", seed=99, family=family_of(pipeline))


def test_sides_are_multiples_of_the_family_s() -> None:
    with pytest.raises(OutOfBounds, match="a multiple of 16 from 32 to 128"):
        settled_as("ZImagePipeline", UnresolvedRequest("p", width=72))
    assert settled_as("StableDiffusionPipeline", UnresolvedRequest("p", width=72)).width == 72


def test_a_picture_is_fitted_to_what_the_family_draws() -> None:
    request = settled_as("SanaSprintPipeline", UnresolvedRequest("p", image=PixelImage(100, 70, b"")))
    assert (request.width, request.height) == (96, 64)


def test_an_edit_by_instruction_takes_no_strength_and_runs_all_its_steps() -> None:
    picture = PixelImage(64, 64, b"")
    request = settled_as("FluxKontextPipeline", UnresolvedRequest("p", image=picture))
    assert (request.strength, request.planned_steps) == (None, 12)
    with pytest.raises(MalformedRequest, match="takes no 'strength'"):
        settled_as("FluxKontextPipeline", UnresolvedRequest("p", image=picture, strength=0.5))


def test_what_a_family_does_not_draw_from_is_refused_with_what_it_does() -> None:
    with pytest.raises(MalformedRequest, match="does not serve 'text'; it serves inpaint"):
        settled_as("FluxFillPipeline", UnresolvedRequest("p"))


def test_the_work_is_that_of_the_family() -> None:
    draft = UnresolvedRequest("p", guidance_scale=1.0)
    assert settled_as("ZImagePipeline", draft).denoiser_runs == 2
    assert settled_as("StableDiffusionXLPipeline", draft).denoiser_runs == 1
    assert settled(draft).denoiser_runs is None


def test_as_many_steps_are_run_as_noise_levels_are_given() -> None:
    levels = PipelineOptions(sigmas=(1.0, 0.6, 0.2))
    assert settled(UnresolvedRequest("p", options=levels)).steps == 3
    with pytest.raises(MalformedRequest, match="'sigmas' has 3"):
        settled(UnresolvedRequest("p", steps=4, options=levels))


def test_a_family_that_needs_two_steps_refuses_one() -> None:
    with pytest.raises(OutOfBounds, match="at least 2 for one"):
        settled_as("QwenImagePipeline", UnresolvedRequest("p", steps=1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((("num_train_timesteps", 5),), "cannot set 'num_train_timesteps'"),
        ((("shift", True),), "must be of type float"),
        ((("shift", 1000.0),), "at most 100"),
        ((("timestep_spacing", "odd"),), "one of leading, linspace, trailing"),
    ],
)
def test_a_request_sets_harmless_options_of_a_scheduler_alone(options: Any, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        settled(UnresolvedRequest("p", scheduler_options=options))


def test_schedulers_go_by_the_names_that_people_type() -> None:
    assert settled(UnresolvedRequest("p", scheduler="DPM++ 2M Karras")).scheduler == "DPM++ 2M Karras"
    with pytest.raises(UnknownScheduler):
        settled(UnresolvedRequest("p", scheduler="Euler z"))


def test_each_key_is_a_share_that_does_not_tell_its_name() -> None:
    first, again, other = (settled(UnresolvedRequest("p", key=key)).share for key in ("mobile", "mobile", "batch"))
    assert first == again != other
    assert "mobile" not in first
    assert settled(UnresolvedRequest("p")).share == ""
