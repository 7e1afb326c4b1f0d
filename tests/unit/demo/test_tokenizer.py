"""The tokenizer made from the demo's captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from serve_app.demo.scenes import COLOUR_NAMES, SHAPES
from serve_app.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("word", [*SHAPES, *COLOUR_NAMES, "background"])
def test_a_word_that_pictures_know_is_one_token(tokenizer: CLIPTokenizer, word: str) -> None:
    assert tokenizer.tokenize(word) == [f"{word}</w>"]


@pytest.mark.parametrize("text", ["quixotic zebra", "Ünïcödé", "猫 と 犬", "🦄", "x" * 300])
def test_any_text_is_encoded_without_unknown_tokens(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids

    assert ids
    assert tokenizer.unk_token_id not in ids


def test_a_long_prompt_is_cut_to_77_tokens(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("red " * 500, padding="max_length", truncation=True, max_length=77).input_ids

    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
