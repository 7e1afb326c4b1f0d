"""What the marks in a prompt mean, in A1111's syntax and in ComfyUI's."""

from __future__ import annotations

from typing import get_args

import pytest
from diffusion_prompt_embedder import parse_prompt_attention
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import AdapterRef, Scales
from serve_app.errors import BadRequest, MalformedRequest, OutOfBounds
from serve_app.prompt_syntax import Fragment, WeighingSyntax, adapters_in, weighted

SYNTAXES: tuple[WeighingSyntax, ...] = get_args(WeighingSyntax)


def read(text: str, syntax: WeighingSyntax = "a1111") -> list[list[tuple[str, float]]]:
    return [[(one.text, one.weight) for one in section] for section in weighted(text, syntax)]


marked = st.lists(
    st.sampled_from(["(", ")", "[", "]", ":1.3)", ":0.5)", "\\(", "\\)", "\\\\", "\\", " a", " red", ", "])
)


@given(marked.map("".join))
def test_a1111s_marks_mean_what_another_reader_of_them_says(text: str) -> None:
    try:
        (section,) = weighted(text, "a1111")
    except BadRequest:
        return  # a bracket with a number, which A1111 reads as a prompt that changes; or too heavy
    expected = [(words, pytest.approx(weight)) for words, weight in parse_prompt_attention(text) if words]
    assert [(one.text, one.weight) for one in section] == expected


@pytest.mark.parametrize(
    ("text", "a1111", "comfyui"),
    [
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)], [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((red:1.2))", [("red", 1.2 * 1.1)], [("red", 1.2)]),
        ("(a (red:1.2):0.5)", [("a ", 0.5), ("red", 0.6)], [("a ", 0.5), ("red", 1.2)]),
        ("((red):1.2)", [("red", 1.1 * 1.2)], [("red", 1.1 * 1.2)]),
        ("[red] \\(cat\\)", [("red", 1 / 1.1), (" (cat)", 1)], [("[red] (cat)", 1)]),
        ("a (red:1.0) cat", [("a red cat", 1)], [("a ", 1), ("red", 1), (" cat", 1)]),
        ("a: b, 3:4 (x: 1.3 )", [("a: b, 3:4 ", 1), ("x", 1.3)], [("a: b, 3:4 ", 1), ("x", 1.3)]),
        ("(red:-0.5)", [("red", -0.5)], [("red", -0.5)]),
        ("", [], []),
    ],
)
def test_weights_multiply_in_a1111_and_are_absolute_in_comfyui(
    text: str, a1111: list[tuple[str, float]], comfyui: list[tuple[str, float]]
) -> None:
    for syntax, expected in zip(SYNTAXES, (a1111, comfyui), strict=True):
        assert read(text, syntax) == [[(words, pytest.approx(weight)) for words, weight in expected]]


def test_break_begins_a_section_in_a1111_alone_whatever_group_it_is_in() -> None:
    assert read("a (red BREAK cat:1.2)BREAK BREAKFAST") == [
        [("a ", 1), ("red ", 1.2)], [(" cat", 1.2)], [(" BREAKFAST", 1)],
    ]  # fmt: skip
    assert weighted("a BREAK b", "comfyui") == ((Fragment("a BREAK b"),),)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("text", ["(" * 10_000, "(" * 5_000 + "a" + ")" * 5_000, "[(" * 5_000, "(a" * 5_000])
def test_ten_thousand_parentheses_are_refused_at_once(text: str, syntax: WeighingSyntax) -> None:
    with pytest.raises(OutOfBounds, match="groups deep, but must be at most 64"):
        read(text, syntax)


def test_long_texts_of_any_marks_are_read() -> None:
    for text in (
        "()" * 5_000,
        " " * 10_000,
        ":" * 10_000,
        "\\" * 10_000,
        ":1." * 3_000,
        "(a:1.0)" * 1_400,
        "<" * 10_000,
    ):
        for syntax in SYNTAXES:
            read(adapters_in(text)[0], syntax)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(red:11)", "'weight of red' is 11, but must be from -10 to 10"),
        ("(" * 30 + "red", "weight of red"),
        ("(" + "9" * 400 + ":" + "9" * 400 + ")", "is inf"),
        ("(red:1.2.3)", "the weight '1.2.3', which is no number"),
        ("[cat:dog:0.5]", r"has \[a:b:0.5\]"),
        ("[cat|dog]", "draw from several prompts"),
        ("a cat AND a dog", "draw from several prompts"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        read(text)


@pytest.mark.parametrize("text", ["a (red", "a red) cat", "red:1.2) cat"])
def test_comfyuis_parentheses_have_two_halves(text: str) -> None:
    with pytest.raises(MalformedRequest, match="'prompt' has a parenthesis without its other half"):
        read(text, "comfyui")


def test_tags_name_adapters_and_leave_the_prompt() -> None:
    found = adapters_in("a cat<lora:demo/style:0.8>, red <lora:my style v1.5> <lyco:b:1:0.5> x < y > z")
    scales = Scales(denoiser=0.5, text_encoder=1.0)
    assert found == (
        "a cat, red   x < y > z",
        (AdapterRef("demo/style", 0.8), AdapterRef("my style v1.5"), AdapterRef("b", scales)),
    )
    assert adapters_in("<lora:a:0.5:0.5>")[1] == (AdapterRef("a", 0.5),)


@pytest.mark.parametrize(
    "tag", ["<lora:>", "<lora:a:b>", "<lora:a:1:1:1>", "<hypernet:a:1>", f"<lora:{'a' * 257}>", "<lora:a:te=1>"]
)
def test_a_tag_that_names_no_adapter_is_refused(tag: str) -> None:
    with pytest.raises(MalformedRequest, match="'<"):
        adapters_in(f"a cat {tag}")
