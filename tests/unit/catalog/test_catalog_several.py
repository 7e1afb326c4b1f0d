"""Requests that name several adapters, or one in several ways."""

from __future__ import annotations

import pytest
from safetensors.numpy import save

from serve_app.errors import MalformedRequest, ModelNotFound, OutOfBounds
from serve_app.refusals import BaseNotServed
from tests.unit.catalog.builders import (
    SDXL_TEXT,
    WEIGHTS,
    World,
    adapter_files,
    lora,
    pair,
    ref,
)

SDXL_LORA = lora(SDXL_TEXT, hidden=48)


async def test_adapters_are_applied_in_one_order_whatever_the_order_of_asking(world: World):
    for rank, name in enumerate(("a", "b", "c"), start=1):
        world.put(f"me/{name}", adapter_files("demo/sd", lora(rank=rank)))
    catalog = world.catalog()
    one = await catalog.resolve(None, (ref("me/c", scale=0.3), ref("me/a"), ref("me/b", scale=0.5)))
    two = await catalog.resolve("me/b", (ref("me/a"), ref("me/c", scale=0.3)))
    assert [(use.spec.id, use.scale) for use in one.adapters] == [("me/a", 1.0), ("me/b", 0.5), ("me/c", 0.3)]
    assert [use.spec for use in two.adapters] == [use.spec for use in one.adapters]


async def test_an_adapter_named_twice_is_a_bad_request(world: World):
    world.put("me/a", adapter_files("demo/sd"))
    catalog = world.catalog()
    for model, refs in ((None, (ref("me/a"), ref("me/a", scale=0.5))), ("me/a", (ref("me/a"),))):
        with pytest.raises(MalformedRequest, match="me/a is named twice"):
            await catalog.resolve(model, refs)


async def test_no_spelling_of_an_adapter_lets_it_be_named_twice(world: World):
    commit = world.hub.push("me/a", adapter_files("demo/sd"))
    world.hub.push("me/copy", adapter_files("demo/sd"))
    for folder in ("mine/a", "mine/copy"):
        world.put(folder, adapter_files("demo/sd"))
    catalog = world.catalog(resolve_alias=lambda asked: ref("me/a", scale=asked.scale) if asked.id == "mine" else asked)
    spellings = [
        ref("me/a", scale=10.0), ref("me/a", revision="main"), ref("me/a", revision=commit), ref("mine"),
        ref("me/a", filename=WEIGHTS), ref("me/a", revision="main", filename=WEIGHTS), ref("me/copy"),
        ref("mine/a"), ref("mine/copy"),
    ]  # fmt: skip
    for first in spellings:
        for second in spellings:
            with pytest.raises(MalformedRequest, match="is named twice"):
                await catalog.resolve("demo/sd", (first, second))


@pytest.mark.parametrize("secret", ["hf_" + "a" * 30, "lpx_" + "b" * 40, "sk-proj-" + "c" * 40])
async def test_what_looks_like_a_key_or_token_is_never_asked_of_the_hub(world: World, secret: str):
    catalog = world.catalog()
    for asked in (ref(secret), ref(f"me/{secret}"), ref("me/a", revision=secret)):
        with pytest.raises(ModelNotFound) as refusal:
            await catalog.resolve(None, (asked,))
        assert secret not in str(refusal.value)
    assert world.hub.count() == 0


async def test_adapters_of_different_bases_cannot_be_combined(world: World):
    world.put("me/a", adapter_files("demo/sd"))
    world.put("me/b", adapter_files("big", SDXL_LORA))
    with pytest.raises(MalformedRequest) as refusal:
        await world.catalog().resolve(None, (ref("me/a"), ref("me/b")))
    for name in ("me/a", "demo/sd", "me/b", "big"):
        assert name in str(refusal.value)


async def test_an_adapter_that_could_be_for_several_bases_follows_one_that_could_not(world: World):
    text_only = save(pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 64))
    world.put("me/open", {WEIGHTS: text_only})
    world.put("me/sure", adapter_files("big", SDXL_LORA))
    catalog = world.catalog()
    resolution = await catalog.resolve(None, (ref("me/open"), ref("me/sure")))
    assert resolution.base.id == "big"
    assert {use.spec.base_id for use in resolution.adapters} == {"big"}
    with pytest.raises(BaseNotServed, match="name one"):
        await catalog.resolve("me/open", ())


async def test_more_adapters_than_any_base_takes_are_refused_before_any_is_looked_up(world: World):
    refs = tuple(ref(f"me/{n}") for n in range(9))
    with pytest.raises(OutOfBounds, match="at most 8"):
        await world.catalog().resolve(None, refs)
    assert world.hub.count() == 0
