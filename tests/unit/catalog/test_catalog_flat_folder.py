"""A folder of single files, as A1111 keeps it, through the catalog."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.catalog.catalog import Catalog
from serve_app.catalog.reading.repository import FLAT, AdapterSource
from serve_app.catalog.resolving.background_index import BackgroundIndex
from serve_app.catalog.sources.file_digests import FileDigests
from serve_app.catalog.sources.flat_folder import FlatFolderSource, FlatRoot
from serve_app.core import AdapterRef
from serve_app.errors import ModelNotFound
from serve_app.refusals import BaseNotServed
from tests.hub_server import HubServer
from tests.unit.catalog.builders import SDXL_TEXT, World, adapter_files, lora, write_files


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with HubServer() as hub:
        yield World(tmp_path, hub)


def flat_catalog(world: World, files: dict[str, bytes], **more: object) -> Catalog:
    root = write_files(world.folder / "Lora", files)
    config = world.config(folders=({"path": root, "layout": "flat"}, world.adapters), **more)
    return world.catalog(config)


async def listed(catalog: Catalog) -> list[str]:
    return [known.spec.id for known in await catalog.known(wait_s=None)]


async def test_a_folder_of_files_is_served_with_one_line_and_lists_what_can_be_served(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sidecar = json.dumps({"activation text": "sks", "preferred weight": 0.6}).encode()
    files = {f"nested/deep/style {at}.safetensors": lora() for at in range(3)}
    catalog = flat_catalog(world, files | {"nested/deep/style 1.json": sidecar, "whole.safetensors": b"no header"})
    world.put("me/style", adapter_files("demo/sd"))
    assert await listed(catalog) == ["me/style", *(f"nested/deep/style {at}" for at in range(3))]
    assert "whole is not listed" in caplog.text
    resolution = await catalog.resolve("nested/deep/style 1", ())
    (use,) = resolution.adapters
    assert (resolution.base.id, use.scale, use.spec.defaults.trigger_words) == ("demo/sd", 0.6, "sks")
    (own,) = (await catalog.resolve(None, (AdapterRef("nested/deep/style 1", 0.2),))).adapters
    assert own.scale == 0.2


async def test_loose_files_above_repositories_are_served_too(world: World) -> None:
    write_files(world.adapters, {"loose.safetensors": lora(), "owner/loose.safetensors": lora()})
    world.put("owner/repository", adapter_files("demo/sd"))
    assert await listed(world.catalog()) == ["loose", "owner/loose", "owner/repository"]


async def test_files_that_appear_change_or_go_are_noticed(world: World) -> None:
    catalog = flat_catalog(world, {"a.safetensors": lora(), "b.safetensors": lora()})
    assert await listed(catalog) == ["a", "b"]
    (before, _) = await catalog.known(wait_s=None)
    root = world.folder / "Lora"
    (root / "b.safetensors").unlink()
    write_files(root, {"a.safetensors": lora(rank=8), "c.safetensors": lora()})
    a, c = await catalog.known(wait_s=None)
    assert (a.spec.id, a.rank, c.spec.id) == ("a", 8, "c")
    assert a.spec.revision != before.spec.revision
    with pytest.raises(ModelNotFound):
        await catalog.adapter(AdapterRef("b", filename="b.safetensors"))


async def test_five_thousand_files_are_looked_up_once_each_and_only_what_changed_again(tmp_path: Path) -> None:
    weights = lora()
    write_files(tmp_path, {f"{at % 50}/{at}.safetensors": weights for at in range(5000)})
    looked_up: list[str] = []

    async def look_up(model: str) -> None:
        looked_up.append(model)

    index = BackgroundIndex([FlatFolderSource([FlatRoot(tmp_path)], digests=FileDigests())], look_up)
    await index.refresh(None)
    assert len(looked_up) == len(set(looked_up)) == len(index.ids) == 5000
    write_files(tmp_path, {"1/1.safetensors": lora(rank=2)})
    await index.refresh(None)
    assert looked_up[5000:] == ["1/1"]


async def test_a_list_shows_what_is_known_while_the_rest_is_looked_up(world: World) -> None:
    catalog = flat_catalog(world, {f"{name}.safetensors": lora() for name in "abc"})
    await catalog.adapter(AdapterRef("b"))
    assert "b" in [known.spec.id for known in await catalog.known(wait_s=0)]
    assert await listed(catalog) == ["a", "b", "c"]


async def test_a_sidecars_fine_tune_is_refused_where_it_is_not_served_and_a_family_decides_between_bases(
    world: World,
) -> None:
    files = {
        "pony.safetensors": lora(), "pony.civitai.info": b'{"baseModel": "Pony"}',
        "both.safetensors": lora(SDXL_TEXT, hidden=None), "both.json": b'{"sd version": "SDXL"}',
    }  # fmt: skip
    catalog = flat_catalog(world, files)
    with pytest.raises(BaseNotServed, match="Pony"):
        await catalog.adapter(AdapterRef("pony"))
    assert (await catalog.resolve("demo/sd", (AdapterRef("pony"),))).base.id == "demo/sd"
    assert (await catalog.adapter(AdapterRef("both"))).base_id == "big"


async def test_a_few_step_file_has_its_sampling_unless_its_sidecar_or_the_alias_says_otherwise(world: World) -> None:
    name = "sdxl_lightning_4step_lora"
    catalog = flat_catalog(world, {f"{name}.safetensors": lora(), f"{name}.json": b'{"preferred weight": 0.9}'})
    found = (await catalog.resolve(name, ())).defaults
    assert (found.steps, found.scheduler, found.guidance_scale) == (4, "Euler Trailing", 0.0)
    named = AdapterRef(name, defaults=AdapterDefaults(scale=0.5, guidance_scale=1.0))
    resolution = await catalog.resolve(None, (named,))
    assert (resolution.defaults.steps, resolution.defaults.guidance_scale) == (4, 1.0)
    assert resolution.adapters[0].scale == 0.5


async def test_an_unknown_name_is_told_the_nearest_file(world: World) -> None:
    catalog = flat_catalog(world, {"watercolour.safetensors": lora()})
    await listed(catalog)
    with pytest.raises(ModelNotFound, match="did you mean 'watercolour'"):
        await catalog.adapter(AdapterRef("watercolor"))


async def test_a_source_that_cannot_be_listed_keeps_what_it_had(world: World) -> None:
    catalog = flat_catalog(world, {"a.safetensors": lora()})
    assert await listed(catalog) == ["a"]
    flat: AdapterSource = next(one for one in catalog._sources if one.origin == FLAT)

    async def failing() -> dict[str, str]:
        raise ModelNotFound("x")

    flat.marks = failing  # type: ignore[method-assign]
    assert await listed(catalog) == ["a"]
