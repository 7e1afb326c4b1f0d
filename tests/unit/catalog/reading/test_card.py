from __future__ import annotations

import pytest

from serve_app.catalog.reading.card import Card, card_from, parse_card


def test_a_base_model_may_be_a_string_or_a_list():
    assert parse_card("---\nbase_model: a/b\n---\n# hi").base_models == ("a/b",)
    assert parse_card("---\nbase_model:\n- a/b\n- c/d\n---\n").base_models == ("a/b", "c/d")


def test_relation_tags_and_trigger_words_are_read():
    card = parse_card(
        "---\nbase_model: a/b\nbase_model_relation: Adapter\ntags: [lora, 'template:sd-lora']\n"
        "instance_prompt: a pencil sketch of\n---\n"
    )
    assert card.relation == "adapter"
    assert card.tags == ("lora", "template:sd-lora")
    assert card.defaults.trigger_words == "a pencil sketch of"


def test_the_tag_of_an_adapter_is_believed_before_the_field_and_that_before_a_plain_tag():
    card = card_from(
        {"base_model": "field/base"},
        ("base_model:plain/base", "base_model:adapter:tag/base", "base_model:finetune:other/base"),
    )
    assert card.claims == ("tag/base", "field/base", "plain/base")


def test_an_address_on_the_hub_is_read_as_the_id_it_holds():
    assert parse_card("---\nbase_model: https://huggingface.co/a/b\n---\n").base_models == ("a/b",)


def test_a_byte_order_mark_and_windows_line_ends_do_not_hide_the_front_matter():
    assert parse_card("\ufeff---\r\nbase_model: a/b\r\n---\r\ntext").base_models == ("a/b",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nbase_model: a/b\n",
        "---\n: : :\n- [\n---\n",
        "---\n- a\n- list\n---\n",
        "---\njust text\n---\n",
        "---\nbase_model: {a: b}\ntags: {x: y}\ninstance_prompt: [[1]]\n---\n",
        "---\nbase_model: ~\ntags: null\ninstance_prompt:\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\nbase_model: " + "x" * 100_000 + "\n---\n",
        "---\nbase_model: &a [*a]\n---\n",
        "---\nwhen: 2024-99-99\nbase_model: !!python/object:os.system {}\n---\n",
    ],
)
def test_what_cannot_be_read_counts_as_not_said(text: str):
    assert parse_card(text) == Card()


def test_odd_values_beside_readable_ones_do_not_hide_them():
    card = parse_card("---\ndate: 2024-99-99\nbase_model: [a/b, {c: d}, 7]\ntags: [lora, [x]]\n---\n")
    assert card.base_models == ("a/b", "7")
    assert card.tags == ("lora",)


@pytest.mark.parametrize(
    "path", ["/workspace/models/sdxl", "./sdxl", "~/sdxl", "C:\\\\models\\\\sdxl", "models/sd/sdxl"]
)
def test_a_path_on_its_authors_disk_names_no_base(path: str) -> None:
    assert parse_card(f'---\nbase_model: "{path}"\n---\n').claims == ()
