"""An adapter's words are known to its own requests, exactly as diffusers would teach them, and to nobody else's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.core import PixelImage
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import manifest_of
from serve_app.engine.drawing.vocabularies import TextualInversion
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import MalformedRequest
from serve_app.settings import AdapterLimits
from tests.engine_cases import photo, request, use_of, wrap
from tests.tiny import latents, tiny_pipeline
from tests.tiny_adapters import lora, write
from tests.tiny_forms import Form, fused_by_diffusers, put, with_text
from tests.tiny_words import NAMES, embeddings, taught_by_diffusers

PROMPT = "a photo of <s0><s1> cat, <s1>"
DTYPES = [torch.float32, torch.bfloat16]


def adapter_with_ti_tokens(
    folder: Path, family: str, dtype: torch.dtype, *, seed: int = 0, ti_tokens: int = 2
) -> ParsedAdapter:
    pipeline = tiny_pipeline(family, dtype)
    path = put(folder, f"adapter {seed}", Form(with_text(pipeline, seed=seed)))
    beside = write(folder / f"words {seed}.safetensors", embeddings(family, seed=seed, ti_tokens=ti_tokens))
    return parse_adapter(path, "owner/adapter", manifest_of(pipeline), AdapterLimits(), beside)


def drawn(pipeline: Any, prompt: str = PROMPT) -> Tensor:
    return latents(pipeline, prompt=prompt, steps=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_words_and_layers_equal_diffusers_own(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = adapter_with_ti_tokens(tmp_path, family, dtype)
    live = tiny_pipeline(family, dtype)
    weights, vocabularies = FusedWeights(live_components(live)), TextualInversion(live)
    weights.apply([(adapter, 0.7)])
    with vocabularies.loaded(adapter.ti_tokens, [live]):
        mine = drawn(live)

    reference = fused_by_diffusers(family, dtype, [(tmp_path / "adapter_0.safetensors", 0.7)])
    for component in live_components(reference).values():
        component.requires_grad_(False)
    theirs = drawn(taught_by_diffusers(reference, family, embeddings(family)))

    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, drawn(live))


@pytest.mark.parametrize("family", NAMES)
def test_the_base_is_the_same_to_the_bit_after_any_history(family: str) -> None:
    live, fresh = tiny_pipeline(family), tiny_pipeline(family)
    expected, own = drawn(fresh), {name: part for name, part in live.components.items() if "tokenizer" in name}
    vocabularies = TextualInversion(live)
    for seed, ti_tokens in enumerate((2, 1, 5, 2)):
        tensors = embeddings(family, seed=seed, ti_tokens=ti_tokens, dtype=torch.float32)
        taught = {NAMES[family][name]: rows for name, rows in tensors.items()}
        with vocabularies.loaded(taught, [live]):
            drawn(live)
        with pytest.raises(ZeroDivisionError), vocabularies.loaded(taught, [live]):
            raise ZeroDivisionError
        assert torch.equal(drawn(live), expected)
    for name, tokenizer in own.items():
        assert getattr(live, name) is tokenizer
        assert "<s0>" not in tokenizer.get_vocab()
    for name in NAMES[family].values():
        mine, theirs = (getattr(pipeline, name).get_input_embeddings().weight for pipeline in (live, fresh))
        assert torch.equal(mine, theirs)


def test_the_words_of_one_adapter_never_linger_for_the_next(tmp_path: Path) -> None:
    live = tiny_pipeline("sdxl")
    vocabularies = TextualInversion(live)
    known = [
        adapter_with_ti_tokens(tmp_path, "sdxl", torch.float32, seed=seed, ti_tokens=2 + seed).ti_tokens
        for seed in range(3)
    ]
    expected = []
    for ti_tokens in known:
        with TextualInversion(fresh := tiny_pipeline("sdxl")).loaded(ti_tokens, [fresh]):
            expected.append(drawn(fresh))
    for place in (0, 2, 1, 2, 0):
        with vocabularies.loaded(known[place], [live]):
            assert torch.equal(drawn(live), expected[place])


def test_a_fault_in_the_middle_of_loading_leaves_the_base(tmp_path: Path) -> None:
    live = tiny_pipeline("sdxl")
    ti_tokens = {"text_encoder": torch.ones(2, 32), "text_encoder_2": torch.ones(2, 31)}
    with pytest.raises(RuntimeError), TextualInversion(live).loaded(ti_tokens, [live]):
        pass
    assert torch.equal(drawn(live), drawn(tiny_pipeline("sdxl")))


class Served:
    """A worker over a tiny base, and the adapters that it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.base = wrap(tiny_pipeline("sdxl"), "sdxl")
        self.worker = EngineWorker(self.base, FusedWeights(self.base.components), max_batch_images=4)
        self.taught = [adapter_with_ti_tokens(folder, "sdxl", torch.float32, seed=seed) for seed in (1, 2)]
        path = put(folder, "plain", Form(lora(tiny_pipeline("sdxl"), seed=3)))
        self.plain = parse_adapter(path, "plain", self.base.manifest, AdapterLimits())

    def draw(self, *adapters: ParsedAdapter, prompt: str = PROMPT, **changes: Any) -> PixelImage:
        uses = tuple(use_of(f"a/{place}") for place in range(len(adapters)))
        job = self.worker.submit(
            request(prompt=prompt, steps=2, adapters=uses, **changes), [(adapter, 1.0) for adapter in adapters]
        )
        return job.future.result(60).images[0]


def test_requests_with_and_without_words_do_not_touch_each_other(tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        first, second = served.taught
        wanted: list[tuple[tuple[ParsedAdapter, ...], dict[str, Any]]] = [
            ((), {}),
            ((first,), {}),
            ((second,), {}),
            ((served.plain,), {}),
            ((served.plain, first), {}),
            ((first,), {"image": photo(), "strength": 0.7}),
            ((), {"image": photo(), "strength": 0.7}),
        ]
        images = [served.draw(*adapters, **changes) for adapters, changes in wanted]
        assert len({image.pixels for image in images}) == len(images)
        again = [served.draw(*adapters, **changes) for adapters, changes in reversed(wanted)]
        assert again[::-1] == images
        with pytest.raises(MalformedRequest, match="name only one of them"):
            served.draw(first, second)
    finally:
        served.worker.close()


def test_a_prompt_is_counted_in_the_words_of_its_own_request(tmp_path: Path) -> None:
    """A learned word is one token; without its adapter it is four letters and marks."""
    base = wrap(tiny_pipeline("sd15"), "sd15")
    prompt = "<s0> " * 70
    assert base.truncation_warning(prompt) == "prompt truncated to 77 tokens"
    with base.with_ti_tokens(adapter_with_ti_tokens(tmp_path, "sd15", torch.float32).ti_tokens):
        assert base.truncation_warning(prompt) is None


def live_components(pipeline: Any) -> dict[str, torch.nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: getattr(pipeline, name) for name in pipeline._lora_loadable_modules if hasattr(pipeline, name)}
