from __future__ import annotations

import json

import pytest

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.catalog.reading.card import Card, parse_card
from serve_app.catalog.reading.sidecars import card_from_sidecars
from serve_app.catalog.reading.stated_defaults import stated_defaults

WEBUI = {
    "description": "ink", "sd version": "SDXL", "activation text": "inkwash, mono", "preferred weight": 0.8,
    "negative text": "colour", "notes": "",
}  # fmt: skip
CIVITAI = {"id": 1, "baseModel": "Pony", "trainedWords": ["ink ", "wash,", "ink "], "model": {"type": "LORA"}}


def read(webui: object = None, civitai: object = None) -> Card:
    files = [None if data is None else json.dumps(data).encode() for data in (webui, civitai)]
    return card_from_sidecars(webui=files[0], civitai=files[1])


def test_what_was_typed_goes_before_what_was_published() -> None:
    assert read(WEBUI).defaults == AdapterDefaults(scale=0.8, negative_prompt="colour", trigger_words="inkwash, mono")
    assert read(None, CIVITAI).defaults == AdapterDefaults(trigger_words="ink, wash")
    assert read(WEBUI, CIVITAI).defaults.trigger_words == "inkwash, mono"
    assert read({**WEBUI, "activation text": " "}, CIVITAI).defaults.trigger_words == "ink, wash"
    # A1111 writes 0 into a field that nobody filled in.
    assert read({**WEBUI, "preferred weight": 0}).defaults.scale is None


def test_a_fine_tune_is_a_claim_and_a_whole_family_a_hint() -> None:
    assert read(None, CIVITAI).claims == ("Pony",)
    for card in (read(WEBUI), read(None, {"baseModel": "SDXL 1.0"})):
        assert card.claims == ()
        assert "stabilityai/stable-diffusion-xl-base-1.0" in card.base_hints
    assert read(WEBUI, CIVITAI).claims == ("Pony",)
    assert read({"sd version": "Unknown"}, {"baseModel": "Other"}) == Card()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 10_000, b'{"baseModel": 3, "trainedWords": 1}']
)
def test_what_cannot_be_read_says_nothing(content: bytes) -> None:
    assert card_from_sidecars(webui=content, civitai=content) == Card()


def test_a_card_states_defaults_in_its_own_block_in_its_example_and_as_instance_prompt() -> None:
    card = parse_card(
        "---\ninstance_prompt: sks\n"
        "widget:\n- text: a cat\n  parameters: {negative_prompt: blurry, guidance_scale: 4, num_inference_steps: 20}\n"
        "loraplex: {scale: '0.5', num_inference_steps: 6, scheduler: LCM, scheduler_options: {shift: 2, rho: 1}}\n---\n"
    )
    assert card.defaults == AdapterDefaults(
        scale=0.5, steps=6, guidance_scale=4.0, scheduler="LCM", scheduler_options=(("shift", 2.0),),
        negative_prompt="blurry", trigger_words="sks",
    )  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        {"scale": "much"}, {"scale": "nan"}, {"scale": True}, {"num_inference_steps": 0}, {"num_inference_steps": 2.5},
        {"num_inference_steps": 10**9}, {"guidance_scale": -1}, {"scheduler": ["LCM"]}, {"timesteps": [999, "x"]},
        {"timesteps": []}, {"scheduler_options": ["shift"]}, {"scheduler_options": {"use_karras_sigmas": "perhaps"}},
        {"negative_prompt": " "}, {"trigger_words": "x" * 2000}, [], None, "text",
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_counts_as_not_said(data: object) -> None:
    assert stated_defaults(data) == AdapterDefaults()


def test_defaults_over_others_take_no_options_of_another_scheduler_and_no_steps_twice() -> None:
    below = AdapterDefaults(
        steps=30, scheduler="Euler", scheduler_options=(("shift", 2.0),), timesteps=(9, 5), trigger_words="sks"
    )
    assert AdapterDefaults(scheduler="LCM").over(below) == AdapterDefaults(
        steps=30, scheduler="LCM", timesteps=(9, 5), trigger_words="sks"
    )
    assert AdapterDefaults(steps=4).over(below) == AdapterDefaults(
        steps=4, scheduler="Euler", scheduler_options=(("shift", 2.0),), trigger_words="sks"
    )
