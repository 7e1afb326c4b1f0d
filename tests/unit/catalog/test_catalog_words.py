"""What lies beside an adapter's file (words, settings, more files) is part of its revision, and reaches the replica."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from serve_app.catalog.files import AdapterFiles
from serve_app.core import AdapterRef
from serve_app.errors import LoraplexError, MalformedRequest
from serve_app.refusals import MalformedFile
from tests.unit.catalog.builders import WEIGHTS, World, adapter_files, lora, pair, renewed

EMBEDDINGS = "embeddings.safetensors"


def words(value: float = 1.0) -> bytes:
    return save({"clip_l": np.full((2, 8), value, np.float32)})


def taught(base: str = "demo/sd", value: float = 1.0) -> dict[str, bytes]:
    return {**adapter_files(base), EMBEDDINGS: words(value)}


async def test_the_words_beside_an_adapter_in_a_folder_are_part_of_its_revision(world: World):
    world.put("me/plain", adapter_files("demo/sd"))
    world.put("me/taught", taught())
    catalog = world.catalog()
    plain, first = [await catalog.adapter(AdapterRef(name)) for name in ("me/plain", "me/taught")]
    assert (plain.embeddings, first.embeddings) == (None, EMBEDDINGS)

    files = AdapterFiles(world.places())
    assert (await files.path(first)).read_bytes() == lora()
    assert (await files.path(first, EMBEDDINGS)).read_bytes() == words()

    world.put("me/taught", {EMBEDDINGS: words(2.0)})
    world.clock.now += 60
    second = await renewed(catalog, AdapterRef("me/taught"), first)
    assert second.filename == first.filename
    assert len({plain.revision, first.revision, second.revision}) == 3
    assert second.key != first.key
    for call in (files.path(first), files.path(first, EMBEDDINGS)):
        with pytest.raises(MalformedFile, match="changed after it was looked up"):
            await call
    assert (await files.path(second, EMBEDDINGS)).read_bytes() == words(2.0)


async def test_the_words_beside_an_adapter_on_the_hub_are_fetched_with_it(world: World):
    world.hub.push("me/taught", {**adapter_files("demo/sd"), "taught_emb.safetensors": words()})
    spec = await world.catalog().adapter(AdapterRef("me/taught"))
    assert (spec.filename, spec.embeddings) == (WEIGHTS, "taught_emb.safetensors")
    files = AdapterFiles(world.places())
    assert (await files.path(spec, spec.embeddings)).read_bytes() == words()
    assert (await files.path(spec)).read_bytes() == lora()


async def test_two_adapters_with_words_are_refused_together_and_served_apart(world: World):
    world.put("me/one", taught())
    world.put("me/two", taught(value=2.0))
    world.put("me/plain", adapter_files("demo/sd"))
    catalog = world.catalog()
    with pytest.raises(MalformedRequest, match="me/one and me/two each bring words"):
        await catalog.resolve(None, (AdapterRef("me/one"), AdapterRef("me/two")))
    resolution = await catalog.resolve(None, (AdapterRef("me/one"), AdapterRef("me/plain")))
    assert [use.spec.embeddings for use in resolution.adapters] == [EMBEDDINGS, None]


async def test_an_embeddings_file_of_an_absurd_size_is_refused_before_it_is_fetched(world: World):
    files = taught()
    files[EMBEDDINGS] = save({"clip_l": np.zeros((5 * 1024, 1024), np.float32)})
    world.put("me/huge", files)
    with pytest.raises(
        LoraplexError, match="'embeddings.safetensors', with the words of adapter me/huge, is too large"
    ):
        await world.catalog().adapter(AdapterRef("me/huge"))


async def test_the_settings_of_peft_beside_an_adapter_are_part_of_what_it_is(world: World):
    text = b'{"peft_type": "LORA", "lora_alpha": 8, "r": 4}'
    world.put("me/peft", {"README.md": adapter_files("demo/sd")["README.md"], "adapter_model.safetensors": lora()})
    plain = await world.catalog().adapter(AdapterRef("me/peft"))
    world.put("me/peft", {"adapter_config.json": text})
    scaled = await world.catalog().adapter(AdapterRef("me/peft"))
    assert (plain.settings, scaled.settings) == (None, text.decode())
    assert scaled.key != plain.key


@pytest.mark.parametrize("source", ["folder", "Hub"])
async def test_an_adapter_in_several_files_is_fetched_whole(world: World, source: str):
    names = ("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors")
    files = {"README.md": adapter_files("demo/sd")["README.md"], names[0]: lora(), names[1]: save(pair("unet.mid", 32))}
    put = world.put if source == "folder" else world.hub.push
    put("me/cut", files)
    spec = await world.catalog().adapter(AdapterRef("me/cut"))
    assert (spec.files, spec.size_bytes) == (names, sum(len(files[name]) for name in names))
    fetched = AdapterFiles(world.places())
    assert [(await fetched.path(spec, name)).read_bytes() for name in names] == [files[name] for name in names]
    put("me/cut", files | {names[1]: save(pair("unet.mid", 64))})
    changed = await world.catalog().adapter(AdapterRef("me/cut"))
    assert changed.key != spec.key
    if source == "folder":
        with pytest.raises(MalformedFile, match="changed after it was looked up"):
            await fetched.path(spec, names[0])
