import json
from typing import Any

import diffusers
import pytest

from serve_app.families.family import TASKS
from serve_app.families.schedulers import SCHEDULERS, is_known_name, kind_of, listed_name, with_shift
from serve_app.families.structure import FAMILIES as STRUCTURES
from serve_app.families.structure import UNET_FAMILIES
from serve_app.families.table import FAMILIES, family_of, other_medium


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_that_a_row_names_is_a_pipeline_of_diffusers(name: str) -> None:
    row = FAMILIES[name]
    assert row.tasks
    assert set(row.tasks) <= set(TASKS)
    assert row.structure in {None, *(known.name for known in STRUCTURES), *UNET_FAMILIES.values()}
    for kind in (name, *row.tasks.values()):
        assert issubclass(getattr(diffusers, kind), diffusers.DiffusionPipeline)


@pytest.mark.parametrize(
    ("pipeline", "scale", "true_cfg", "has_negative", "runs"),
    [
        ("StableDiffusionXLPipeline", 1.0, None, True, 1),
        ("StableDiffusionXLPipeline", 5.0, None, False, 2),
        ("StableDiffusionInstructPix2PixPipeline", 5.0, None, False, 3),
        ("LatentConsistencyModelPipeline", 8.0, None, False, 1),
        ("FluxPipeline", 3.5, None, True, 1),
        ("FluxPipeline", 3.5, 4.0, False, 1),
        ("FluxPipeline", 3.5, 4.0, True, 2),
        ("QwenImagePipeline", 4.0, None, False, 2),
        ("QwenImagePipeline", 1.0, None, True, 1),
        ("ZImagePipeline", 1.0, None, False, 2),
        ("ZImagePipeline", 0.0, None, False, 1),
        ("Flux2Pipeline", 4.0, None, False, 1),
    ],
)
def test_a_step_runs_the_denoiser_as_often_as_the_family_says(
    pipeline: str, scale: float, true_cfg: float | None, has_negative: bool, runs: int
) -> None:
    assert family_of(pipeline).evaluations(scale, true_cfg, has_negative_prompt=has_negative) == runs


def test_a_base_s_own_configuration_changes_its_row() -> None:
    assert (
        family_of("Flux2KleinPipeline", {"is_distilled": True}).evaluations(4.0, None, has_negative_prompt=False) == 1
    )
    assert not family_of("FluxPipeline", {}, {"guidance_embeds": False}).reads_guidance
    assert family_of("FluxPipeline", {}, {"guidance_embeds": True}).reads_guidance
    latent_consistency = family_of("StableDiffusionXLPipeline", {}, {"time_cond_proj_dim": 256})
    assert latent_consistency.evaluations(8.0, None, has_negative_prompt=False) == 1


def test_a_class_without_a_row_shares_no_passes_and_says_that_it_is_unknown() -> None:
    family = family_of("SomethingNewPipeline")
    assert (family.is_known, family.shares_passes, family.previews, family.tasks) == (False, False, False, None)


@pytest.mark.parametrize(
    ("pipeline", "medium"),
    [
        ("WanPipeline", "videos"), ("LTXPipeline", "videos"), ("HunyuanVideoPipeline", "videos"),
        ("Kandinsky6TI2VAPipeline", "videos"), ("MotifVideoPipeline", "videos"), ("LongCatAudioDiTPipeline", "sound"),
        ("RFD4ProteinaPipeline", "proteins"), ("StableAudioPipeline", "sound"), ("SanaPipeline", None),
        ("Kandinsky5T2IPipeline", None),
    ],
)  # fmt: skip
def test_pipelines_that_make_no_pictures_are_known_by_their_class(pipeline: str, medium: str | None) -> None:
    assert other_medium(pipeline) == medium


@pytest.mark.parametrize("prompt", ["make it red", '{"a": 1}', "[1]", "[" * 5000, 'say "edit_instruction"'])
def test_plain_words_become_the_instruction_where_the_pipeline_reads_an_object(prompt: str) -> None:
    assert json.loads(family_of("BriaFiboEditPipeline").worded(prompt)) == {"edit_instruction": prompt}
    assert family_of("BriaFiboPipeline").worded(prompt) == prompt


def test_a_prompt_that_is_the_object_goes_to_the_pipeline_as_it_is() -> None:
    prompt = '{"objects": [], "edit_instruction": "make it red"}'
    assert family_of("BriaFiboEditPipeline").worded(prompt) == prompt


@pytest.mark.parametrize(
    ("typed", "kind", "listed"),
    [
        ("DPM++ 2M Karras", "noise", "DPM++ 2M Karras"),
        ("dpm++ 2m karras", "noise", "DPM++ 2M Karras"),
        ("Euler a", "noise", "EulerAncestralDiscreteScheduler"),
        ("euler_a", "noise", "EulerAncestralDiscreteScheduler"),
        ("UniPC", "flow", "UniPCMultistepScheduler"),
        ("Euler", "flow", "FlowMatchEulerDiscreteScheduler"),
        ("Euler", "noise", "EulerDiscreteScheduler"),
        ("LCM", "noise", "LCMScheduler"),
        ("Nobody's", "noise", "Nobody's"),
    ],
)
def test_a_scheduler_goes_by_the_names_that_people_type(typed: str, kind: Any, listed: str) -> None:
    assert listed_name(typed, kind) == listed


def test_every_listed_scheduler_is_a_class_of_diffusers_and_known_by_its_name() -> None:
    for choices in SCHEDULERS.values():
        for name, choice in choices.items():
            assert isinstance(getattr(diffusers, choice.class_name), type)
            assert is_known_name(name)


def test_what_a_scheduler_predicts_is_read_from_its_configuration() -> None:
    assert kind_of("FlowMatchEulerDiscreteScheduler", {}) == "flow"
    assert kind_of("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}) == "flow"
    assert kind_of("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}) == "noise"


def test_a_shift_replaces_the_one_by_size_under_both_its_names() -> None:
    assert with_shift({"shift": 3.0}) == {"shift": 3.0, "flow_shift": 3.0, "use_dynamic_shifting": False}
    assert with_shift({"use_karras_sigmas": True}) == {"use_karras_sigmas": True}
