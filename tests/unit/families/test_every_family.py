"""Every family on its tiny pipeline: what its row says is what the engine does."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from serve_app.core import PipelineOptions
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.drawing.trial import try_tasks
from serve_app.errors import BadRequest, OutOfBounds, PipelineRefused
from tests.engine_cases import base_config, largest_difference
from tests.family_cases import asked, counted_runs, drawn, served
from tests.tiny_families.build import IMAGE_FAMILIES, NEED_TORCHVISION

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=IMAGE_FAMILIES)
def pipeline(request: pytest.FixtureRequest) -> BasePipeline:
    if request.param in NEED_TORCHVISION and not HAS_TORCHVISION:
        pytest.skip("its processor needs torchvision")
    return served(request.param)


def test_every_task_of_the_row_passes_its_trial(pipeline: BasePipeline) -> None:
    tasks = pipeline.tasks
    try_tasks(pipeline, base_config("sd15"))
    assert pipeline.tasks == tasks == tuple(pipeline.family.tasks or ())


def test_the_size_asked_for_is_drawn_with_a_preview_where_the_family_has_one(pipeline: BasePipeline) -> None:
    multiple = pipeline.family.side_multiple
    width = 64 + multiple if 64 % (2 * multiple) == 0 else 96
    task = pipeline.tasks[0]
    previews: list[object] = []
    image, _ = drawn(pipeline, asked(task, width=width, num_previews=1), on_preview=previews.append)
    assert (image.width, image.height) == (width, 64)
    assert len(previews) == pipeline.family.previews


def test_a_side_that_is_no_multiple_is_refused_before_the_device(pipeline: BasePipeline) -> None:
    with pytest.raises(OutOfBounds, match=f"a multiple of {pipeline.family.side_multiple}"):
        pipeline.check(asked(pipeline.tasks[0], width=64 + pipeline.family.side_multiple // 2))


def test_work_is_predicted_exactly_for_any_guidance_and_negative_prompt(pipeline: BasePipeline) -> None:
    task = pipeline.tasks[0]
    takes = pipeline.parameters(task)
    negatives = [None, "red"] if "negative_prompt" in takes else [None]
    for scale in (0.0, 1.0, 4.0):
        for negative in negatives:
            for true_cfg in (None, 3.0) if "true_cfg_scale" in takes else (None,):
                options = PipelineOptions(true_cfg_scale=true_cfg)
                wanted = asked(task, guidance_scale=scale, negative_prompt=negative, options=options)
                runs = pipeline.family.evaluations(scale, true_cfg, has_negative_prompt=negative is not None)
                with counted_runs(pipeline) as calls:
                    drawn(pipeline, wanted)
                assert sum(calls) == runs * wanted.steps, (scale, negative, true_cfg)


def test_guidance_and_negative_prompt_change_the_image_or_are_answered_with_a_warning(pipeline: BasePipeline) -> None:
    task = pipeline.tasks[0]
    plain, _ = drawn(pipeline, asked(task))
    guided, warnings = drawn(pipeline, asked(task, guidance_scale=9.0))
    assert guided != plain or any("guidance_scale changes nothing" in line for line in warnings)
    if "negative_prompt" not in pipeline.parameters(task):
        with pytest.raises(BadRequest, match="takes no 'negative_prompt'"):
            pipeline.check(asked(task, negative_prompt="red dog painting"))
        return
    negative, warnings = drawn(pipeline, asked(task, negative_prompt="red dog painting"))
    assert negative != plain or any("negative_prompt changes nothing" in line for line in warnings)
    with_none, warnings = drawn(pipeline, asked(task, negative_prompt="red dog", guidance_scale=0.0))
    assert any("negative_prompt changes nothing" in line for line in warnings)


def test_an_image_does_not_depend_on_who_shares_its_pass(pipeline: BasePipeline) -> None:
    if pipeline.max_images_per_pass == 1:
        pytest.skip("its images never share a pass")
    task = pipeline.tasks[0]
    pair = asked(task), asked(task, prompt="a painting of a red dog in the style of pixel art " * 2, seed=9)
    alone = [drawn(pipeline, one)[0] for one in pair]
    shares = pipeline.generate(pair).images
    together = [images[0] for images in shares if isinstance(images, tuple)]
    assert [largest_difference(*images) <= 1 for images in zip(alone, together, strict=True)] == [True, True]


def test_every_scheduler_on_offer_draws(pipeline: BasePipeline) -> None:
    task, failed = pipeline.tasks[0], list[str]()
    for name in pipeline.schedulers():
        wanted = asked(task, scheduler=name, steps=4)
        try:
            image, _ = drawn(pipeline, wanted)
        except PipelineRefused:
            failed.append(name)
        else:
            assert image.width == wanted.width, name
    assert failed == []


def test_a_scheduler_that_cannot_begin_with_a_picture_is_refused_for_one(pipeline: BasePipeline) -> None:
    for task in set(pipeline.tasks) & {"image", "inpaint"}:
        for name in {"UniPCMultistepScheduler", "FlowMatchLCMScheduler"} & set(pipeline.schedulers()):
            try:
                pipeline.check(asked(task, scheduler=name, steps=4))
            except BadRequest:
                continue
            assert drawn(pipeline, asked(task, scheduler=name, steps=4))[0].width == 64
