from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.catalog.catalog import Resolution
from serve_app.catalog.resolving.combined_defaults import combined_defaults
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterSpec, GenerationRequest, PipelineOptions, ScaledAdapter, UnresolvedRequest
from serve_app.deployments.ingress.adapter_defaults import check_defaults, resolve_with_adapters
from serve_app.errors import MalformedRequest, OutOfBounds
from serve_app.families.family import NEVER, Family

BASE = BaseModelConfig.model_validate(
    {"id": "one", "source": {"embedded": "one"}, "defaults": {"steps": 12, "guidance_scale": 3.0}}
)
GUIDED = Family("guided")
TRAILING = (("timestep_spacing", "trailing"),)
LCM = AdapterDefaults(steps=4, guidance_scale=0.0, scheduler="LCM", scheduler_options=TRAILING)


def resolved(draft: UnresolvedRequest, *defaults: AdapterDefaults, family: Family | None = GUIDED) -> GenerationRequest:
    uses = [
        ScaledAdapter(AdapterSpec(f"a/{at}", "one", "r", "f", "folder", "l", 1, defaults=one), 1.0)
        for at, one in enumerate(defaults)
    ]
    resolution = Resolution(BASE, tuple(uses), combined_defaults(defaults))
    return resolve_with_adapters(draft, resolution, request_id="r", seed=1, family=family)


def sampling(request: GenerationRequest) -> tuple[object, ...]:
    return request.steps, request.guidance_scale, request.scheduler, dict(request.scheduler_options)


def test_what_a_request_leaves_open_comes_from_the_adapter_before_the_base() -> None:
    assert sampling(resolved(UnresolvedRequest("p"), LCM)) == (4, 0.0, "LCM", dict(TRAILING))
    assert sampling(resolved(UnresolvedRequest("p"), NO_DEFAULTS)) == (12, 3.0, None, {})
    assert sampling(resolved(UnresolvedRequest("p"), AdapterDefaults(steps=5))) == (5, 3.0, None, {})


def test_a_requests_own_words_win_one_by_one() -> None:
    draft = UnresolvedRequest("p", steps=8, guidance_scale=1.5)
    assert sampling(resolved(draft, LCM)) == (8, 1.5, "LCM", dict(TRAILING))
    # Options of one scheduler are not given to another.
    assert sampling(resolved(UnresolvedRequest("p", scheduler="Euler"), LCM)) == (4, 0.0, "Euler", {})
    own = UnresolvedRequest("p", scheduler_options=(("timestep_spacing", "linspace"),))
    assert sampling(resolved(own, LCM))[2:] == ("LCM", {"timestep_spacing": "linspace"})


def test_timesteps_of_an_adapter_stand_for_the_steps_unless_the_request_has_its_own() -> None:
    dmd = AdapterDefaults(timesteps=(999, 749), scheduler="LCM")
    assert resolved(UnresolvedRequest("p"), dmd).options.timesteps == (999, 749)
    assert resolved(UnresolvedRequest("p"), dmd).steps == 2
    assert resolved(UnresolvedRequest("p", steps=6), dmd).options.timesteps is None
    own = UnresolvedRequest("p", options=PipelineOptions(sigmas=(1.0, 0.5, 0.1)))
    assert (resolved(own, dmd).steps, resolved(own, dmd).options.timesteps) == (3, None)


def test_of_several_adapters_the_first_with_a_scheduler_gives_the_sampling_as_a_whole() -> None:
    style = AdapterDefaults(steps=40, guidance_scale=7.0, negative_prompt="blurry")
    request = resolved(UnresolvedRequest("p", guidance_scale=2.0), style, LCM, replace(LCM, steps=1))
    assert (request.steps, request.scheduler, request.negative_prompt) == (4, "LCM", "blurry")


def test_a_negative_prompt_is_set_only_where_the_base_reads_it() -> None:
    blurry = AdapterDefaults(negative_prompt="blurry")
    assert resolved(UnresolvedRequest("p"), blurry).negative_prompt == "blurry"
    assert resolved(UnresolvedRequest("p", negative_prompt=""), blurry).negative_prompt == ""
    assert resolved(UnresolvedRequest("p", guidance_scale=1.0), blurry).negative_prompt is None
    for family in (Family("flow", guided_above=NEVER), None):
        assert resolved(UnresolvedRequest("p"), blurry, family=family).negative_prompt is None


@pytest.mark.parametrize(
    "defaults",
    [AdapterDefaults(steps=1000), AdapterDefaults(scheduler="nonsense"), AdapterDefaults(guidance_scale=900.0)],
)
def test_defaults_that_the_base_cannot_draw_with_are_refused_naming_the_adapter_and_the_way_out(
    defaults: AdapterDefaults,
) -> None:
    with pytest.raises(MalformedRequest, match=r"the defaults of a/0 do not fit one: .*say in the request"):
        resolved(UnresolvedRequest("p"), defaults)
    resolved(UnresolvedRequest("p", steps=3, scheduler="Euler", guidance_scale=1.0), defaults)
    with pytest.raises(OutOfBounds, match="num_inference_steps"):
        resolved(UnresolvedRequest("p", steps=500), defaults)


def test_defaults_are_checked_where_they_are_registered_also_for_a_base_that_only_edits() -> None:
    spec = AdapterSpec("a/b", "one", "r", "f", "folder", "l", 1, defaults=AdapterDefaults(scale=99.0))
    edits = Family("edits", tasks={"edit": "X"})
    with pytest.raises(OutOfBounds, match="scale of a/b"):
        check_defaults(spec, BASE, GUIDED)
    check_defaults(replace(spec, defaults=LCM), BASE, edits)
    with pytest.raises(MalformedRequest, match="do not fit"):
        check_defaults(replace(spec, defaults=AdapterDefaults(steps=1000)), BASE, edits)
