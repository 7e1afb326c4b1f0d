import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import BaseModelConfig
from serve_app.core import (
    AdapterSpec,
    GenerationRequest,
    PixelImage,
    PixelMask,
    Scale,
    ScaledAdapter,
    Scales,
    UnresolvedRequest,
)
from serve_app.deployments.ingress.resolve_defaults import resolve_defaults
from serve_app.errors import OutOfBounds, UnknownScheduler

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
