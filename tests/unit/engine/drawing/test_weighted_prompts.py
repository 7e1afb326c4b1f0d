"""Prompts with weights and prompts of several chunks are embedded as the libraries for it embed them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusion_prompt_embedder.clip.tokenization import get_prompts_tokens_with_weights
from diffusion_prompt_embedder.core.embedding import encode_prompt_chunks_batched
from torch import Tensor

from serve_app.core import PipelineOptions
from serve_app.demo.embedded import embedded_root
from serve_app.engine.drawing.texts import encode_individually, text_encoders_of
from serve_app.engine.drawing.weighted_prompts import with_embeddings
from serve_app.engine.worker.scheduling import batch_key
from serve_app.errors import MalformedRequest, OutOfBounds
from serve_app.prompt_syntax import WeighingSyntax, weighted
from tests.engine_cases import largest_difference, load, one_image, picture, request, wrap

LONG = "a large red circle above a small blue square on a green ground " * 8
COLOURED = "a (red:{}) circle and a blue square"
SKIP = PipelineOptions(clip_skip=1)
SYNTAXES: tuple[WeighingSyntax, ...] = ("a1111", "comfyui")
loaded = functools.cache(load)


@functools.cache
def demo_pipeline(name: str) -> Any:
    root = embedded_root()
    assert root is not None
    return DiffusionPipeline.from_pretrained(root / "demo" / name)


def embedded(pipeline: Any, prompt: str, negative: str | None, syntax: WeighingSyntax) -> dict[str, Tensor]:
    texts = {"prompt": [prompt]} | ({} if negative is None else {"negative_prompt": [negative]})
    with torch.no_grad(), encode_individually(text_encoders_of(pipeline)):
        return with_embeddings(pipeline, texts, syntax, is_guided=True)


def by_compel(pipeline: Any, text: str) -> tuple[Tensor, Tensor | None]:
    """Return what compel makes of a text of weights from 1 on, where it means what ComfyUI does."""
    (fragments,) = weighted(text, "comfyui")
    last, penultimate, pooled = (
        ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
        ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        ReturnedEmbeddingsType.POOLED,
    )
    is_xl = hasattr(pipeline, "text_encoder_2")

    def provider(place: str, kind: ReturnedEmbeddingsType) -> EmbeddingsProvider:
        parts = getattr(pipeline, f"tokenizer{place}"), getattr(pipeline, f"text_encoder{place}")
        return EmbeddingsProvider(
            *parts, truncate=False, returned_embeddings_type=kind, split_long_text_mode=SplitLongTextMode.BRUTAL
        )

    with torch.no_grad():
        parts: list[Any] = [
            provider(place, penultimate if is_xl else last).get_embeddings_for_weighted_prompt_fragments(
                [[one.text for one in fragments]], [[one.weight for one in fragments]]
            )
            for place in (("", "_2") if is_xl else ("",))
        ]
        whole: Any = (
            provider("_2", pooled).get_pooled_embeddings(["".join(one.text for one in fragments)]) if is_xl else None
        )
    return torch.cat(parts, dim=-1), whole


@pytest.mark.parametrize("prompt", ["a (red:1.4) (circle) on blue", f"a (red:1.5) circle, {LONG}", "red"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_comfyuis_weights_and_chunks_are_compels(name: str, prompt: str) -> None:
    demo = demo_pipeline(name)
    found = embedded(demo, prompt, "a (square:1.2)", "comfyui")
    for text, side in ((prompt, ""), ("a (square:1.2)", "negative_")):
        expected, pooled = by_compel(demo, text)
        chunks = found["prompt_embeds"].shape[1] // expected.shape[1]
        assert torch.equal(found[f"{side}prompt_embeds"], expected.repeat(1, chunks, 1))
        if pooled is not None:
            assert torch.equal(found[f"{side}pooled_prompt_embeds"], pooled)


def multiplied(pipeline: Any, text: str) -> Tensor:
    """Return what another library makes of a text in A1111's syntax, without BREAK, the means as they come."""
    own, device = pipeline.tokenizer, torch.device("cpu")
    tokens, weights = get_prompts_tokens_with_weights(own, text)
    places = range(0, len(tokens), 75)
    ids = [[own.bos_token_id, *tokens[at : at + 75], own.eos_token_id] for at in places]
    framed = [[1.0, *weights[at : at + 75], 1.0] for at in places]
    with torch.no_grad():
        return encode_prompt_chunks_batched(
            pipeline.text_encoder,
            [[row + [own.pad_token_id] * (77 - len(row)) for row in ids]],
            [[row + [1.0] * (77 - len(row)) for row in framed]],
            device,
            torch.float32,
        )


@pytest.mark.parametrize("prompt", ["a (red:1.4) [circle] on (blue:0.3)", f"a (red:1.5) circle {LONG}"])
def test_a1111s_weights_and_chunks_are_another_librarys_with_the_mean_as_before(prompt: str) -> None:
    pipeline = demo_pipeline("sd15")
    found = embedded(pipeline, prompt, prompt, "a1111")
    bare = "".join(one.text for one in weighted(prompt, "a1111")[0])
    chunks = zip(
        multiplied(pipeline, bare).split(77, dim=1), multiplied(pipeline, prompt).split(77, dim=1), strict=True
    )
    expected = torch.cat([one * (own.mean() / one.mean()) for own, one in chunks], dim=1)
    assert len(expected[0]) == (154 if LONG in prompt else 77)
    assert torch.allclose(found["prompt_embeds"], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found["negative_prompt_embeds"], found["prompt_embeds"])


def test_a1111_goes_back_to_a_comma_and_begins_a_chunk_at_break() -> None:
    pipeline = demo_pipeline("sd15")
    words = "red " * 60 + "circle, "
    parted = embedded(pipeline, words + "blue " * 20, None, "a1111")["prompt_embeds"]
    assert torch.equal(parted, embedded(pipeline, words + "BREAK" + " blue" * 20, None, "a1111")["prompt_embeds"])
    far = "red " * 40 + "circle, "
    cut = embedded(pipeline, far + "blue " * 40, None, "a1111")["prompt_embeds"]
    assert torch.equal(
        cut, embedded(pipeline, far + "blue " * 33 + "BREAK" + " blue" * 7, None, "a1111")["prompt_embeds"]
    )


def test_comfyui_moves_a_short_group_into_the_next_chunk_as_a_whole() -> None:
    pipeline = demo_pipeline("sd15")
    found = embedded(pipeline, "red " * 72 + "(blue green circle square:1.0)", None, "comfyui")["prompt_embeds"]
    expected = embedded(pipeline, "red " * 72 + "BREAK blue green circle square", None, "a1111")["prompt_embeds"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("negative", [None, "a dog"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_with_every_weight_1_a_picture_is_the_plain_one_to_the_bit(
    family: str, negative: str | None, syntax: WeighingSyntax
) -> None:
    base = loaded(family)
    plain = one_image(base, request(negative_prompt=negative, options=SKIP))
    weighed = request(prompt="a (photo:1.0) (of:1) a cat", negative_prompt=negative, options=SKIP, prompt_syntax=syntax)
    assert one_image(base, weighed).pixels == plain.pixels
    heavy = replace(weighed, prompt="a photo of a (cat:2)")
    assert one_image(base, heavy).pixels != plain.pixels


def test_requests_of_as_many_chunks_share_a_pass_and_others_do_not() -> None:
    base = loaded("sdxl")
    asked = [
        request(prompt=prompt, negative_prompt="a dog", prompt_syntax="a1111", seed=seed)
        for seed, prompt in enumerate(["a (cat:1.3) BREAK a dog", "[red] BREAK cat", "a cat", "a (dog:1.1)"])
    ]
    keys = [batch_key(one, (), base.count_chunks(one)) for one in asked]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    together = base.generate(asked[:2])
    for images, one in zip(together.images, asked, strict=False):
        assert isinstance(images, tuple)
        assert largest_difference(images[0], one_image(base, one)) <= 1
    assert together.warnings == ((), ())


def test_all_of_a_long_prompt_is_read_and_no_warning_says_otherwise() -> None:
    base = loaded("sd15")
    texts = {end: "a cat " * 40 + end for end in ("red", "painting")}
    plain = [base.generate([request(prompt=text)]) for text in texts.values()]
    assert plain[0].images == plain[1].images
    assert plain[0].warnings == (("prompt truncated to 77 tokens",),)
    chunked = [base.generate([request(prompt=text, prompt_syntax="a1111")]) for text in texts.values()]
    assert chunked[0].images != chunked[1].images
    assert chunked[0].warnings == ((),)


def test_a_text_of_too_many_chunks_is_refused_before_the_device() -> None:
    base = loaded("sd15")
    with pytest.raises(OutOfBounds, match="'negative_prompt' is 12 chunks long, but must be at most 8 chunks"):
        base.count_chunks(request(negative_prompt="cat BREAK " * 12, prompt_syntax="a1111"))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_base_that_does_not_read_by_clip_alone_takes_plain_prompts_only(family: str) -> None:
    base = loaded(family)
    assert base.abilities().prompt_syntaxes == ("plain",)
    with pytest.raises(MalformedRequest, match="tiny/base takes no 'prompt_syntax' but 'plain'"):
        base.check(request(prompt_syntax="a1111"))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_heavier_colour_is_more_of_the_picture(syntax: WeighingSyntax) -> None:
    base = wrap(demo_pipeline("sd15"))
    asked = request(prompt=COLOURED, prompt_syntax=syntax, width=128, height=128, steps=8)

    def redness(weight: float) -> float:
        drawn = numpy.asarray(picture(one_image(base, replace(asked, prompt=COLOURED.format(weight))))).astype(float)
        return float((drawn[..., 0] - drawn[..., 2]).mean())

    assert redness(0.2) + 5 < redness(1.0) < redness(1.8) - 5
