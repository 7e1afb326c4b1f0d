"""Requests drawn from what `/v1/bases` says of a base never end in a 5xx, and others end in a 4xx."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serve_app.config import BaseModelConfig
from serve_app.core import PipelineOptions, UnresolvedRequest
from serve_app.deployments.ingress.resolve_defaults import resolve_defaults
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import BadRequest, LoraplexError, PipelineRefused
from serve_app.families.family import TASKS, Task
from tests.engine_cases import BASE, photo
from tests.family_cases import MASK, every_family, served

CONFIG = BaseModelConfig.model_validate(
    {
        "id": BASE,
        "source": {"embedded": "none"},
        "defaults": {"steps": 3, "width": 64, "height": 64},
        "limits": {"min_side": 32, "max_side": 128},
    }
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "negative_prompt": st.sampled_from(["", "red"]),
    "strength": st.floats(0.01, 1),
    "true_cfg_scale": st.floats(0, 8),
    "guidance_rescale": st.floats(0, 1),
    "clip_skip": st.integers(0, 12),
    "max_sequence_length": st.integers(1, 128),
    "prompt_2": st.just("a dog"),
    "timesteps": st.lists(st.integers(0, 1000), min_size=1, max_size=4).map(tuple),
    "sigmas": st.lists(st.floats(0, 20), min_size=1, max_size=4).map(tuple),
}
OPTIONS = {"shift": st.floats(0.5, 6), "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"])}


@pytest.fixture(scope="module", params=every_family())
def pipeline(request: pytest.FixtureRequest) -> BasePipeline:
    return served(request.param)


def draft(task: Task, scheduler: str | None = None, options: Any = (), **given: Any) -> UnresolvedRequest:
    """Return a request as the HTTP layer reads it."""
    own = {name: given.pop(name) for name in list(given) if name in PipelineOptions.__slots__}
    image = None if task == "text" else photo(48, 80)
    return UnresolvedRequest(
        "a photo of a cat",
        image=image,
        mask=MASK if task == "inpaint" else None,
        scheduler=scheduler,
        scheduler_options=options,
        options=PipelineOptions(**own),
        seed=1,
        **given,
    )


def outcome(pipeline: BasePipeline, asked: UnresolvedRequest) -> LoraplexError | None:
    """Resolve, check and draw a request; return its error."""
    try:
        request = resolve_defaults(asked, CONFIG, (), request_id="r", seed=1, family=pipeline.family)
        pipeline.check(request)
        (images,) = pipeline.generate([request]).images
    except LoraplexError as error:
        return error
    if isinstance(images, LoraplexError):
        return images
    assert [(image.width, image.height) for image in images] == [(request.width, request.height)] * request.num_images
    return None


# Without shrinking, which would draw a hundred more pictures of a failure.
@settings(max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_a_base_says_it_takes_is_drawn_or_refused_by_name(pipeline: BasePipeline, data: st.DataObject) -> None:
    told = pipeline.abilities()
    task = data.draw(st.sampled_from(sorted(told.parameters)))
    sides = st.sampled_from([None, 64, 64 + told.side_multiple])
    names = [name for name in told.parameters[task] if name in VALUES]
    chosen = data.draw(st.sets(st.sampled_from(names))) if names else set[str]()
    given = {name: data.draw(VALUES[name]) for name in sorted(chosen)}
    options = [(name, data.draw(OPTIONS[name])) for name in data.draw(st.sets(st.sampled_from(sorted(OPTIONS))))]
    asked = draft(
        task,
        data.draw(st.sampled_from([None, *told.schedulers])),
        tuple(sorted(options)),
        steps=None if chosen & {"sigmas", "timesteps"} else data.draw(st.sampled_from([None, told.min_steps, 5])),
        guidance_scale=data.draw(st.sampled_from([None, 0.0, 1.0, 6.0])),
        width=data.draw(sides),
        height=data.draw(sides),
        num_images=data.draw(st.sampled_from([1, 1, 2])),
        **given,
    )
    error = outcome(pipeline, asked)
    assert error is None or (isinstance(error, BadRequest) and not isinstance(error, PipelineRefused)), repr(error)


def test_what_a_base_does_not_say_ends_in_a_4xx(pipeline: BasePipeline) -> None:
    told = pipeline.abilities()
    task = next(iter(told.parameters))
    others = [draft(task, "SCMScheduler" if "SCMScheduler" not in told.schedulers else "DDIMScheduler")]
    others += [draft(task, width=64 + told.side_multiple // 2), draft(task, steps=0)]
    # A picture without a mask is an edit where the family does not redraw.
    unserved = set(TASKS) - set(told.parameters) - ({"image"} if "edit" in told.parameters else {"edit"})
    others += [draft(other) for other in sorted(unserved)]
    values = {"negative_prompt": "red", "true_cfg_scale": 2.0, "guidance_rescale": 0.5, "clip_skip": 1, "prompt_2": "x"}
    others += [draft(task, **{name: value}) for name, value in values.items() if name not in told.parameters[task]]
    for asked in others:
        assert isinstance(outcome(pipeline, asked), BadRequest), asked
