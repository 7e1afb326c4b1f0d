"""Every family on its tiny pipeline: what its row says is what the engine does, and what docs/families.md says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from serve_app.core import PipelineOptions, PixelImage
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.drawing.trial import try_tasks
from serve_app.engine.weights.device_cache import as_they_are
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.unfused import UnfusedAdapters
from serve_app.errors import BadRequest, LoraplexError, OutOfBounds
from serve_app.families.family import TASKS
from serve_app.settings import AdapterLimits
from tests import family_table
from tests.engine_cases import base_config, largest_difference, photo
from tests.family_cases import asked, counted_runs, drawn, every_family, served_as
from tests.tiny_adapters import linear, lora, write
from tests.tiny_families.build import tiny_family
from tests.tiny_forms import weights_of

# Bases of a class that another one stands for in the table.
VARIANTS = ("sd21", "sdxl_vpred", "sd35", "flux_schnell")
# Every scheduler draws every task of these, which stand for noise and for flows; of others the tasks take turns.
EACH_WITH_EACH = ("sd15", "sd3")


@dataclass
class Subject:
    """One family's tiny base, and what the tests have proved of it, by column of the table."""

    name: str
    live: object
    pipeline: BasePipeline
    proved: dict[str, str] = field(default_factory=dict[str, str])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=every_family())
def subject(request: pytest.FixtureRequest) -> Subject:
    live = tiny_family(request.param)
    return Subject(request.param, live, served_as(live))


@pytest.fixture
def pipeline(subject: Subject) -> BasePipeline:
    return subject.pipeline


def test_every_task_of_the_row_passes_its_trial(subject: Subject) -> None:
    pipeline = subject.pipeline
    tasks = pipeline.tasks
    try_tasks(pipeline, base_config("sd15"))
    assert pipeline.tasks == tasks == tuple(pipeline.family.tasks or ())
    abilities = pipeline.abilities()
    subject.proved |= {
        "family": abilities.family,
        "`_class_name`": f"`{abilities.pipeline}`",
        **{task: "yes" if task in tasks else "" for task in TASKS},
    }


def test_the_size_asked_for_is_drawn_with_a_preview_where_the_family_has_one(subject: Subject) -> None:
    pipeline, multiple = subject.pipeline, subject.pipeline.family.side_multiple
    width = 64 + multiple if 64 % (2 * multiple) == 0 else 96
    previews: list[list[tuple[PixelImage, ...]]] = []
    wanted = asked(pipeline.tasks[0], width=width, num_previews=1)
    image, _ = drawn(pipeline, wanted, on_preview=lambda shares: previews.append(list(shares)))
    assert (image.width, image.height) == (width, 64)
    assert len(previews) == pipeline.family.previews
    for ((preview,),) in previews:
        assert (width % preview.width, 64 % preview.height) == (0, 0)
        assert len(set(preview.pixels)) > 1
    with pytest.raises(OutOfBounds, match=f"a multiple of {multiple}"):
        pipeline.check(asked(pipeline.tasks[0], width=64 + multiple // 2))
    subject.proved |= {"previews": "yes" if previews else "", "sides": str(multiple)}


def test_work_is_predicted_exactly_for_any_guidance_and_negative_prompt(subject: Subject) -> None:
    pipeline, family = subject.pipeline, subject.pipeline.family
    task, takes = pipeline.tasks[0], pipeline.parameters(pipeline.tasks[0])
    negatives = [None, "red"] if "negative_prompt" in takes else [None]
    for scale in (0.0, 1.0, 4.0):
        for negative in negatives:
            for true_cfg in (None, 3.0) if "true_cfg_scale" in takes else (None,):
                options = PipelineOptions(true_cfg_scale=true_cfg)
                wanted = asked(
                    task, guidance_scale=scale, negative_prompt=negative, options=options, steps=family.min_steps
                )
                runs = family.evaluations(scale, true_cfg, has_negative_prompt=negative is not None)
                with counted_runs(pipeline) as calls:
                    drawn(pipeline, wanted)
                assert sum(calls) == runs * wanted.steps, (scale, negative, true_cfg)
    subject.proved["denoiser runs twice"] = _when_twice(pipeline)


def _when_twice(pipeline: BasePipeline) -> str:
    family = pipeline.family
    if family.has_own_true_cfg:
        return "with a negative prompt and `true_cfg_scale` over 1"
    if math.isinf(family.guided_above):
        return "never" if family.guided_above > 0 else "always"
    times = "" if family.guided_runs == 2 else f", {family.guided_runs} times"
    return f"over {family.guided_above:g}{times}"


def test_guidance_and_negative_prompt_change_the_image_or_are_answered_with_a_warning(pipeline: BasePipeline) -> None:
    task = pipeline.tasks[0]
    plain, _ = drawn(pipeline, asked(task))
    guided, lines = drawn(pipeline, asked(task, guidance_scale=9.0))
    assert guided != plain or any("guidance_scale changes nothing" in line for line in lines)
    if "negative_prompt" not in pipeline.parameters(task):
        with pytest.raises(BadRequest, match="takes no 'negative_prompt'"):
            pipeline.check(asked(task, negative_prompt="red dog painting"))
        return
    negative, lines = drawn(pipeline, asked(task, negative_prompt="red dog painting"))
    assert negative != plain or any("negative_prompt changes nothing" in line for line in lines)
    _, lines = drawn(pipeline, asked(task, negative_prompt="red dog", guidance_scale=0.0))
    assert any("negative_prompt changes nothing" in line for line in lines)


def test_an_image_does_not_depend_on_who_shares_its_pass(subject: Subject) -> None:
    pipeline = subject.pipeline
    subject.proved["shares passes"] = "yes" if pipeline.max_images_per_pass is None else ""
    if pipeline.max_images_per_pass == 1:
        return
    task = pipeline.tasks[0]
    pair = asked(task), asked(task, prompt="a painting of a red dog in the style of pixel art " * 2, seed=9)
    alone = [drawn(pipeline, one)[0] for one in pair]
    shares = pipeline.generate(pair).images
    together = [images[0] for images in shares if isinstance(images, tuple)]
    assert [largest_difference(*images) <= 1 for images in zip(alone, together, strict=True)] == [True, True]


def test_every_scheduler_on_offer_draws_or_is_refused_for_a_task_and_none_sticks(subject: Subject) -> None:
    pipeline, failed = subject.pipeline, list[tuple[str, str]]()
    own, _ = drawn(pipeline, asked(pipeline.tasks[0]))
    names, side = pipeline.schedulers(), 64 if pipeline.family.takes_references else 32
    for place, name in enumerate(names):
        turn, drawn_tasks = place % len(pipeline.tasks), 0
        for task in (*pipeline.tasks[turn:], *pipeline.tasks[:turn]):
            wanted = asked(task, scheduler=name, steps=4, guidance_scale=1.0, width=side, height=side)
            try:
                pipeline.check(wanted)
            except BadRequest:  # one that cannot begin with a picture
                continue
            try:
                drawn_tasks += drawn(pipeline, wanted)[0].width == wanted.width
            except LoraplexError as error:
                failed.append((f"{name} for {task}", str(error)))
            # The names with a space are the others with options that choose the levels.
            if subject.name not in EACH_WITH_EACH or " " in name:
                break
        assert drawn_tasks, name
    assert failed == []
    assert drawn(pipeline, asked(pipeline.tasks[0]))[0] == own
    subject.proved["schedulers"] = str(len(names))


def test_the_prompt_is_read_as_far_as_is_said_and_a_longer_one_is_answered_with_a_warning(subject: Subject) -> None:
    pipeline, tokens = subject.pipeline, subject.pipeline.abilities().tokens
    assert tokens is not None
    assert pipeline.truncation_warning("a " * (tokens // 4)) is None
    assert pipeline.truncation_warning("a " * (2 * tokens)) == f"prompt truncated to {tokens} tokens"
    subject.proved["tokens"] = str(pipeline.family.tokens or "tokenizer's")


def test_several_pictures_change_the_image_or_are_answered_with_a_warning(subject: Subject) -> None:
    pipeline = subject.pipeline
    takes = pipeline.abilities().references
    for task in set(pipeline.tasks) & {"edit", "image"}:
        one, _ = drawn(pipeline, asked(task))
        two, lines = drawn(pipeline, asked(task, references=(photo(32, 96),)))
        assert (two != one) == takes
        assert any("only the first of 2 pictures is used" in line for line in lines) != takes
    subject.proved["several pictures"] = "yes" if takes else ""


def test_an_adapter_of_every_linear_layer_does_what_diffusers_does_beside_the_layers_and_fused(
    subject: Subject, tmp_path: Path
) -> None:
    pipeline, theirs = subject.pipeline, tiny_family(subject.name)
    path = write(tmp_path / "adapter.safetensors", lora(theirs, pipeline.manifest.denoiser, chooses=linear))
    adapter = parse_adapter(path, "owner/adapter", pipeline.manifest, AdapterLimits())
    plain, _ = drawn(pipeline, asked(pipeline.tasks[0]))
    weights, unfused = FusedWeights(pipeline.components), UnfusedAdapters(pipeline.components, as_they_are)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    unfused.apply((), [adapter], [1.0])
    beside, _ = drawn(pipeline, asked(pipeline.tasks[0]))
    unfused.restore()
    assert beside == drawn(served_as(theirs), asked(pipeline.tasks[0]))[0]
    weights.apply([(adapter, 1.0)])
    try:
        theirs.fuse_lora(components=[pipeline.manifest.denoiser])
        mine, fused = weights_of(subject.live), weights_of(theirs)  # type: ignore[arg-type]
        assert [name for name in fused if not torch.equal(fused[name], mine[name])] == []
        assert drawn(pipeline, asked(pipeline.tasks[0]))[0] != plain
    finally:
        weights.apply([])
    assert drawn(pipeline, asked(pipeline.tasks[0]))[0] == plain
    subject.proved["adapter equals diffusers"] = "yes"


def test_the_documentation_says_what_was_proved(subject: Subject) -> None:
    if subject.name in VARIANTS:
        return
    if len(subject.proved) < len(family_table.COLUMNS):
        pytest.skip("not all of the family's tests ran and passed")
    family_table.check_or_renew(subject.proved)
