"""A text's embedding has the bits that it has alone, whatever is encoded beside it."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.engine.drawing.texts import encode_individually, text_encoders_of
from tests.tiny import FAMILIES, tiny_pipeline

TEXTS = ["a photo of a cat", "red", "a photo of a cat", "painting of a dog in the pixel art style"]


def embeddings(pipeline: Any, texts: list[str]) -> list[Tensor]:
    """Return all that the pipeline makes of texts, each with a row for each text."""
    wanted = signature(pipeline.encode_prompt).parameters
    options: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": 32, "prompt_2": None}
    options |= {"device": torch.device("cpu"), "num_images_per_prompt": 1, "prompt_3": None}
    options = {name: value for name, value in options.items() if name in wanted}
    found = pipeline.encode_prompt(texts, **options)
    return [each for each in found if each is not None and len(each) == len(texts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_in_a_batch_has_the_bits_that_it_has_alone(family: str, dtype: torch.dtype) -> None:
    pipeline = tiny_pipeline(family, dtype)
    alone = [embeddings(pipeline, [text]) for text in TEXTS]
    with encode_individually(text_encoders_of(pipeline)):
        together = embeddings(pipeline, TEXTS)
    assert together
    for place, single in enumerate(alone):
        assert all(torch.equal(batch[place : place + 1], one) for batch, one in zip(together, single, strict=False))


def test_afterwards_the_encoders_are_as_they_were() -> None:
    pipeline = tiny_pipeline("sdxl")
    encoders = text_encoders_of(pipeline)
    before = [vars(encoder).keys() for encoder in encoders]

    class Stop(Exception):
        pass

    with pytest.raises(Stop), encode_individually(encoders):
        raise Stop
    assert len(encoders) == 2
    assert [vars(encoder).keys() for encoder in encoders] == before
    assert not any("forward" in vars(encoder) for encoder in encoders)
