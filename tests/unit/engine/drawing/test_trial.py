from typing import Any

import pytest

from serve_app.engine.base import schedulers
from serve_app.engine.drawing.trial import try_tasks
from serve_app.errors import BaseUnusable, MalformedRequest, PipelineRefused
from tests.engine_cases import base_config, photo, request, wrap
from tests.tiny import tiny_pipeline


def refusing(pipeline: Any, method: str) -> Any:
    """Give a live part of a pipeline a method that refuses what it is given, as diffusers' own checks do."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("`height` has to be divisible by 3\nand more")

    setattr(pipeline, method, refuse)
    return pipeline


def test_a_task_that_fails_its_trial_is_served_no_more() -> None:
    live = tiny_pipeline("sd15")
    refusing(live.vae, "encode")
    pipeline = wrap(live, schedulers=("DDIMScheduler",))
    try_tasks(pipeline, base_config("sd15"))
    assert pipeline.tasks == ("text",)
    assert set(pipeline.abilities().parameters) == {"text"}
    with pytest.raises(MalformedRequest, match="makes images from text only"):
        pipeline.check(request(image=photo(), strength=0.5))


def test_a_base_that_can_do_nothing_is_unusable_with_the_cause() -> None:
    live = tiny_pipeline("sd15")
    refusing(live.vae, "decode")
    with pytest.raises(BaseUnusable, match="failed: PipelineRefused: .* 'height' has to be divisible by 3$"):
        try_tasks(wrap(live), base_config("sd15"))


def test_what_a_pipeline_says_of_its_arguments_is_the_request_s_own_fault() -> None:
    live = tiny_pipeline("sd15")
    pipeline = wrap(live)
    refusing(live, "check_inputs")
    with pytest.raises(PipelineRefused) as caught:
        pipeline.generate([request()])
    assert caught.value.status == 400
    assert str(caught.value) == "tiny/base cannot draw this request: 'height' has to be divisible by 3"


def test_a_trial_leaves_the_random_numbers_of_the_process_alone() -> None:
    import torch

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    try_tasks(wrap(tiny_pipeline("sd15")), base_config("sd15"))
    assert torch.equal(torch.rand(1), expected)


def test_no_request_pays_for_the_trial_of_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = wrap(tiny_pipeline("sd15"))
    names = pipeline.abilities().schedulers  # as a replica asks before it is ready

    def too_late(template: object) -> None:
        raise AssertionError(template)

    monkeypatch.setattr(schedulers, "_runs_through", too_late)
    monkeypatch.setattr(schedulers, "_fewest_steps", too_late)
    for name in names:
        pipeline.check(request(scheduler=name, steps=10))
