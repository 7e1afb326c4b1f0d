"""One base as a function: what comes out, and that nothing stays behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    EulerDiscreteScheduler,
)
from PIL import Image

from serve_app.core import GenerationRequest, PixelImage, PixelMask
from serve_app.engine.drawing.arguments import MAX_SEED, seeds_of
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.drawing.steps import GenerationCancelled
from serve_app.errors import InternalError, OutOfBounds, UnknownScheduler
from serve_app.refusals import NonFinite
from tests.engine_cases import largest_difference, load, one_image, photo, picture, request, use_of, wrap
from tests.tiny import tiny_folder, tiny_pipeline

LONG_PROMPT = "cat " * 100


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


loaded = cache(load)


@pytest.fixture(scope="module")
def pipeline(family: str) -> BasePipeline:
    return loaded(family)


# What no family does in a way of its own is tried with one.
ANY_FAMILY = pytest.mark.parametrize("family", ["sd15"], scope="module")
# What takes long and is hardly different for the second.
SLOW_FOR_SDXL = pytest.mark.parametrize(
    "family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)], scope="module"
)


@pytest.fixture(scope="module")
def plain(family: str) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(family))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_image(plain: Any, wanted: GenerationRequest, **arguments: Any) -> PixelImage:
    """Return what the diffusers call that anyone would write gives."""
    image = plain(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        generator=torch.Generator().manual_seed(wanted.seed),
        **arguments,
    ).images[0]
    return PixelImage(image.width, image.height, image.tobytes())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": "red painting"},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "negative_prompt": "red"},
        {"width": 128, "height": 96, "steps": 2},
    ],
)
def test_an_image_is_that_of_the_plain_diffusers_call(
    pipeline: BasePipeline, plain: Any, changes: dict[str, Any]
) -> None:
    wanted = request(**changes)
    expected = plain_image(plain, wanted, width=wanted.width, height=wanted.height)
    assert one_image(pipeline, wanted) == expected


def test_an_image_from_an_image_is_that_of_the_plain_diffusers_call(pipeline: BasePipeline, plain: Any) -> None:
    wanted = request(image=photo(), strength=0.7)
    expected = plain_image(AutoPipelineForImage2Image.from_pipe(plain), wanted, image=picture(photo()), strength=0.7)
    assert one_image(pipeline, wanted) == expected


def half_mask(width: int = 64, height: int = 64) -> PixelMask:
    """Return a mask whose left half is redrawn."""
    left = width // 2
    return PixelMask(width, height, (b"\xff" * left + b"\0" * (width - left)) * height)


def rows_of(image: PixelImage) -> Any:
    return numpy.frombuffer(image.pixels, "uint8").reshape(image.height, image.width, 3)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_what_a_mask_lets_be_drawn_is_that_of_the_plain_diffusers_call(
    pipeline: BasePipeline, plain: Any, strength: float
) -> None:
    wanted = request(image=photo(), mask=half_mask(), strength=strength)
    expected = plain_image(
        AutoPipelineForInpainting.from_pipe(plain), wanted, image=picture(photo()), strength=strength,
        mask_image=Image.frombytes("L", (64, 64), half_mask().values), width=64, height=64,
    )  # fmt: skip
    drawn = rows_of(one_image(pipeline, wanted))
    assert numpy.array_equal(drawn[:, :32], rows_of(expected)[:, :32])
    assert not numpy.array_equal(drawn[:, :32], rows_of(photo())[:, :32])


def test_what_a_mask_keeps_is_as_it_was_given(pipeline: BasePipeline) -> None:
    wanted = request(image=photo(), mask=half_mask(), strength=1.0, num_images=2)
    (images,) = pipeline.generate([wanted]).images
    assert isinstance(images, tuple)
    for image in images:
        assert numpy.array_equal(rows_of(image)[:, 32:], rows_of(photo())[:, 32:])


@ANY_FAMILY
def test_a_mask_follows_its_picture_to_another_size(pipeline: BasePipeline) -> None:
    image = one_image(pipeline, request(image=photo(32, 32), mask=half_mask(32, 32), strength=1.0))
    kept = picture(photo(32, 32)).resize((64, 64), Image.Resampling.LANCZOS)
    assert numpy.array_equal(rows_of(image)[:, 33:], numpy.asarray(kept)[:, 33:])


@ANY_FAMILY
def test_masks_of_one_pass_are_each_requests_own(pipeline: BasePipeline) -> None:
    inverted = PixelMask(64, 64, bytes(255 - value for value in half_mask().values))
    wanted = [
        request(image=photo(), mask=mask, strength=1.0, seed=seed) for seed, mask in enumerate((half_mask(), inverted))
    ]
    for each, images in zip(wanted, pipeline.generate(wanted).images, strict=True):
        assert isinstance(images, tuple)
        assert largest_difference(images[0], one_image(pipeline, each)) <= 1


def test_an_image_with_another_scheduler_is_that_of_the_plain_diffusers_call(
    family: str, pipeline: BasePipeline
) -> None:
    plain = DiffusionPipeline.from_pretrained(tiny_folder(family))
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    wanted = request(scheduler="EulerDiscreteScheduler")
    assert one_image(pipeline, wanted) == plain_image(plain, wanted, width=64, height=64)


@ANY_FAMILY
def test_an_input_image_is_resized_to_the_size_asked_for(pipeline: BasePipeline) -> None:
    image = one_image(pipeline, request(image=photo(50, 30), width=96, height=64, strength=0.5))
    assert (image.width, image.height) == (96, 64)


@ANY_FAMILY
def test_strength_decides_how_much_of_the_input_is_left(pipeline: BasePipeline) -> None:
    def distance(strength: float) -> float:
        image = one_image(pipeline, request(image=photo(), strength=strength, steps=4))
        drawn, given = (numpy.asarray(picture(each), dtype=float) for each in (image, reference))
        return float(abs(drawn - given).mean())

    reference = one_image(pipeline, request(image=photo(), strength=0.25, steps=4))
    assert distance(0.5) < distance(0.75) < distance(1.0)


@ANY_FAMILY
def test_strength_unsaid_is_the_default_of_the_base(pipeline: BasePipeline) -> None:
    unsaid = one_image(pipeline, request(image=photo(), strength=None))
    assert unsaid == one_image(pipeline, request(image=photo(), strength=0.8))


@SLOW_FOR_SDXL
def test_what_a_request_gets_does_not_depend_on_what_ran_before(pipeline: BasePipeline) -> None:
    wanted = request(negative_prompt="red")
    alone = one_image(pipeline, wanted)
    for other in (
        request(scheduler="EulerAncestralDiscreteScheduler", width=128),
        request(image=photo(), strength=0.9),
        request(image=photo(), mask=half_mask(), strength=1.0),
        request(prompt=LONG_PROMPT, guidance_scale=1.0),
        request(num_images=3, negative_prompt="dog", seed=MAX_SEED),
        request(scheduler="PNDMScheduler", steps=5),
    ):
        pipeline.generate([other])
        assert one_image(pipeline, wanted) == alone


@ANY_FAMILY
def test_images_of_one_request_are_drawn_with_successive_seeds(pipeline: BasePipeline) -> None:
    (images,) = pipeline.generate([request(num_images=3, seed=11)]).images
    assert isinstance(images, tuple)
    assert len({image.pixels for image in images}) == 3
    for seed, image in zip((11, 12, 13), images, strict=True):
        assert largest_difference(image, one_image(pipeline, request(seed=seed))) <= 1


def test_seeds_wrap_round_after_the_largest() -> None:
    assert seeds_of(request(seed=MAX_SEED, num_images=2)) == (MAX_SEED, 0)


@SLOW_FOR_SDXL
@pytest.mark.parametrize("changes", [{"negative_prompt": "red"}, {}, {"image": photo(), "strength": 0.8}])
def test_requests_in_one_pass_get_what_each_gets_alone(pipeline: BasePipeline, changes: dict[str, Any]) -> None:
    wanted = [
        request(prompt="a dog", seed=1, **changes),
        request(prompt=LONG_PROMPT, seed=2, num_images=2, **changes),
        request(seed=3, **changes),
    ]
    shares = pipeline.generate(wanted).images
    for each, images in zip(wanted, shares, strict=True):
        assert isinstance(images, tuple)
        assert len(images) == each.num_images
        assert largest_difference(images[0], one_image(pipeline, request(**changes, **_own(each)))) <= 1


def _own(wanted: GenerationRequest) -> dict[str, Any]:
    return {"prompt": wanted.prompt, "seed": wanted.seed}


@ANY_FAMILY
def test_progress_counts_every_step(pipeline: BasePipeline) -> None:
    heard: list[tuple[int, int]] = []
    pipeline.generate([request(steps=4)], on_step=lambda step, steps: heard.append((step, steps)))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


@ANY_FAMILY
def test_a_cancelled_pass_stops_at_the_next_step_and_leaves_no_trace(pipeline: BasePipeline) -> None:
    before = one_image(pipeline, request())
    heard: list[int] = []
    with pytest.raises(GenerationCancelled):
        pipeline.generate(
            [request(steps=50, scheduler="DPMSolverMultistepScheduler", negative_prompt="red")],
            on_step=lambda step, _: heard.append(step),
            is_cancelled=lambda: len(heard) == 2,
        )
    assert heard == [1, 2]
    assert one_image(pipeline, request()) == before


@ANY_FAMILY
def test_a_pass_that_breaks_leaves_no_trace(pipeline: BasePipeline) -> None:
    def break_down(step: int, steps: int) -> None:
        raise RuntimeError("no memory left")

    before = one_image(pipeline, request())
    with pytest.raises(RuntimeError, match="no memory"):
        pipeline.generate([request(scheduler="HeunDiscreteScheduler")], on_step=break_down)
    assert one_image(pipeline, request()) == before


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # diffusers' own call
def test_decoding_that_breaks_leaves_the_vae_in_its_dtype() -> None:
    live = tiny_pipeline("sdxl", torch.float16)  # SDXL's VAE decodes in float32 and goes back
    pipeline = wrap(live)
    before = one_image(pipeline, request(steps=1))

    def break_down(*_: Any) -> None:
        raise RuntimeError("no memory left")

    hook = live.vae.decoder.register_forward_hook(break_down)
    with pytest.raises(RuntimeError, match="no memory"):
        pipeline.generate([request(steps=1)])
    hook.remove()
    assert one_image(pipeline, request(steps=1)) == before


def test_an_image_that_is_not_finite_is_an_error_that_names_the_adapters(family: str) -> None:
    live = tiny_pipeline(family)
    pipeline = wrap(live)

    def poison(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(0, torch.tensor([0]), torch.nan)

    adapted = request(adapters=(use_of("me/night", 9.0), use_of("me/sepia")), guidance_scale=1.0)
    live.vae.decoder.conv_out.register_forward_hook(poison)
    spoilt, sound = pipeline.generate([adapted, request(guidance_scale=1.0)]).images
    (base_spoilt,) = pipeline.generate([request(request_id="request-9")]).images
    assert isinstance(spoilt, NonFinite)
    assert "me/night at scale 9 with me/sepia at scale 1" in str(spoilt)
    assert isinstance(sound, tuple)
    assert isinstance(base_spoilt, InternalError)
    assert "request-9" in str(base_spoilt)


def test_a_prompt_over_the_window_is_truncated_with_a_warning(pipeline: BasePipeline) -> None:
    long, short = request(prompt=LONG_PROMPT, negative_prompt=""), request(negative_prompt=LONG_PROMPT)
    assert pipeline.generate([long, short]).warnings == (
        ("prompt truncated to 77 tokens",),
        ("negative prompt truncated to 77 tokens",),
    )


@pytest.mark.parametrize("prompt", ["", "cat " * 75, "x" * 75, "é" * 30])
def test_a_prompt_within_the_window_has_no_warning(pipeline: BasePipeline, prompt: str) -> None:
    assert pipeline.truncation_warning(prompt) is None


def test_a_prompt_one_token_over_the_window_has_a_warning(pipeline: BasePipeline) -> None:
    assert pipeline.truncation_warning("cat " * 76) is not None


def test_an_unknown_scheduler_is_refused_with_the_choices() -> None:
    pipeline = wrap(tiny_pipeline("sd15"), schedulers=("DDIMScheduler", "DDIM Trailing"))
    with pytest.raises(UnknownScheduler, match="choose one of: DDIM Trailing, DDIMScheduler"):
        pipeline.check(request(scheduler="EulerScheduler"))


@ANY_FAMILY
def test_fewer_steps_than_a_scheduler_can_run_are_refused(pipeline: BasePipeline) -> None:
    with pytest.raises(OutOfBounds, match="at least 4 with PNDMScheduler"):
        pipeline.check(request(scheduler="PNDMScheduler", steps=3))
    pipeline.check(request(scheduler="PNDMScheduler", steps=4))


@ANY_FAMILY
def test_a_strength_that_leaves_no_step_is_refused(pipeline: BasePipeline) -> None:
    with pytest.raises(OutOfBounds, match="'strength' is 0.2, but must be at least 1/4 with 4 steps"):
        pipeline.check(request(image=photo(), strength=0.2, steps=4))
    pipeline.check(request(image=photo(), strength=0.25, steps=4))


@ANY_FAMILY
@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_outside_64_bits_is_refused(pipeline: BasePipeline, seed: int) -> None:
    with pytest.raises(OutOfBounds, match="seed"):
        pipeline.check(request(seed=seed))


@pytest.mark.parametrize(("other", "texts"), [("a photo of a cat", 2), ("a dog", 3)])
def test_each_text_is_encoded_once_and_alone_for_all_images_of_a_pass(
    pipeline: BasePipeline, other: str, texts: int
) -> None:
    seen: list[int] = []
    encoder: Any = pipeline.components["text_encoder"]
    norm = encoder.final_layer_norm  # every encoding goes through it once
    hook = norm.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    single, double = request(negative_prompt="blurry"), request(prompt=other, negative_prompt="blurry", num_images=2)
    try:
        outcome = pipeline.generate([single, double])
    finally:
        hook.remove()
    assert seen == [1] * texts
    shares = [images for images in outcome.images if isinstance(images, tuple)]
    assert [len(images) for images in shares] == [1, 2]
    assert largest_difference(shares[0][0], one_image(pipeline, single)) <= 1


def test_a_pass_between_the_steps_of_another_changes_no_bit_of_either(pipeline: BasePipeline) -> None:
    outer = request(steps=4, negative_prompt="red", num_previews=2, prompt="a dog")
    mask = PixelMask(64, 64, bytes(64 * 32) + bytes([255]) * (64 * 32))
    inner = [request(image=photo(), strength=0.8, mask=mask), request(scheduler="DPMSolverMultistepScheduler")]
    expected = [one_image(pipeline, wanted) for wanted in (outer, *inner)]
    drawn: list[PixelImage] = []

    def other() -> None:
        drawn.append(one_image(pipeline, inner[len(drawn) % 2]))

    (images,) = pipeline.generate([outer], between_steps=other, on_preview=lambda _: None).images
    assert images == (expected[0],)
    assert drawn == [expected[1], expected[2], expected[1]]
