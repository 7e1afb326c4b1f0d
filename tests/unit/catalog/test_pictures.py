"""Pictures that come with adapters, and drawn ones, from every kind of source."""

from __future__ import annotations

import pytest

from serve_app.catalog.catalog import Catalog
from serve_app.catalog.pictures import AdapterPictures
from serve_app.catalog.reading.repository import MAX_PICTURE_BYTES
from serve_app.core import HubToken
from serve_app.errors import ModelNotFound, NoPicture
from tests.s3_server import S3Server
from tests.unit.catalog.builders import World, adapter_files, lora, ref, write_files

ALICE, BOB = HubToken("hf_alice"), HubToken("hf_bob")
SHOWN = "images/cover.PNG"


def shown(url: str = f"./{SHOWN}", content: bytes = b"pixels") -> dict[str, bytes]:
    """An adapter whose card has a picture."""
    widget = [{"text": "a fox"}, {"text": "a cat", "output": {"url": url}}]
    return adapter_files("demo/sd", widget=widget) | {SHOWN: content}


async def shrink(name: str, content: bytes) -> bytes:
    return f"small {name} ".encode() + content[:20]


def pictures(world: World, catalog: Catalog) -> AdapterPictures:
    return AdapterPictures(catalog, world.folder / "cache" / "pictures")


async def found(world: World, catalog: Catalog, model: str, token: HubToken | None = None) -> bytes | None:
    return await pictures(world, catalog).find(ref(model), shrink, token=token)


async def test_a_card_shows_its_picture_from_a_folder_a_bucket_and_the_hub(s3: S3Server, world: World) -> None:
    world.put("me/local", shown())
    bucket = s3.bucket({f"me/stored/{name}": content for name, content in shown().items()})
    world.hub.push("me/hubs", shown())
    world.put("me/plain", adapter_files("demo/sd"))
    config = world.config(stores=({"url": f"s3://{bucket}", "timeout_s": 60},))
    catalog = world.catalog(config)
    for model in ("me/local", "me/stored", "me/hubs"):
        assert await found(world, catalog, model) == f"small {SHOWN} pixels".encode()
    assert await found(world, catalog, "me/plain") is None
    asked = world.hub.count("me/hubs"), s3.count("GET", "cover")
    # Another catalog is another process; nothing is read twice.
    for again in (catalog, world.catalog(config)):
        await again.lookup_adapter(ref("me/hubs"))
        asked_by_lookup = world.hub.count("me/hubs", "model")
        assert await found(world, again, "me/hubs") == await found(world, again, "me/stored")
        assert world.hub.count("me/hubs", "model") == asked_by_lookup
    assert s3.count("GET", "cover") == asked[1] == 1
    known = {one.spec.id: (one.has_picture, one.example_prompt) for one in await catalog.known(wait_s=None)}
    assert known == {
        "me/local": (True, "a fox"), "me/stored": (True, "a fox"), "me/hubs": (True, "a fox"), "me/plain": (False, None)
    }  # fmt: skip


async def test_the_preview_beside_a_file_is_shown_and_a_new_one_too(s3: S3Server, world: World) -> None:
    files = {"ink.safetensors": lora(), "ink.preview.png": b"one", "other.preview.png": b"no adapter's"}
    root = write_files(world.folder / "Lora", {f"styles/{name}": content for name, content in files.items()})
    bucket = s3.bucket({f"flat/{name}": content for name, content in files.items()})
    world.put("me/whole", adapter_files("demo/sd") | {"pytorch_lora_weights.preview.webp": b"one"})
    catalog = world.catalog(
        world.config(
            folders=({"path": root, "layout": "flat"}, world.adapters),
            stores=({"url": f"s3://{bucket}", "timeout_s": 60, "layout": "flat"},),
        )
    )
    for model in ("styles/ink", "flat/ink"):
        assert await found(world, catalog, model) == b"small ink.preview.png one"
    assert await found(world, catalog, "me/whole") == b"small pytorch_lora_weights.preview.webp one"
    (root / "styles" / "ink.preview.png").write_bytes(b"two")
    assert await found(world, catalog, "styles/ink") == b"small ink.preview.png two"


@pytest.mark.parametrize(
    "url", ["https://example.org/cover.png", "../other/cover.png", "/etc/passwd.png", "missing.png", "film.mp4", ""]
)
async def test_a_card_names_a_file_of_its_own_repository_and_no_other_place(world: World, url: str) -> None:
    world.put("me/style", shown(url) | {"film.mp4": b"x"})
    write_files(world.adapters / "me" / "other", {"cover.png": b"secret"})
    assert await found(world, world.catalog(), "me/style") is None


async def test_a_picture_that_is_too_large_is_refused_with_the_limit(world: World) -> None:
    world.put("me/local", shown(content=bytes(MAX_PICTURE_BYTES + 1)))
    world.hub.push("me/hubs", shown(content=bytes(MAX_PICTURE_BYTES + 1)))
    catalog = world.catalog()
    for model in ("me/local", "me/hubs"):
        with pytest.raises(NoPicture, match="more than 8 MiB"):
            await found(world, catalog, model)


async def test_a_private_adapters_picture_is_for_those_who_may_read_it(world: World) -> None:
    world.hub_settings["forward_tokens"] = True
    for model in ("me/private", "me/drawn"):
        world.hub.push(model, shown() if model == "me/private" else adapter_files("demo/sd"))
        world.hub.hide(model, tokens=frozenset({ALICE.value}))
    catalog = world.catalog()
    await pictures(world, catalog).keep(ref("me/drawn"), b"drawn", token=ALICE)
    for model, picture in (("me/private", f"small {SHOWN} pixels".encode()), ("me/drawn", b"drawn")):
        for _ in range(2):
            assert await found(world, catalog, model, ALICE) == picture
            for token in (BOB, None):
                with pytest.raises(ModelNotFound):
                    await found(world, catalog, model, token)


async def test_a_drawn_picture_is_that_of_the_bytes_it_was_drawn_with(world: World) -> None:
    world.put("me/style", adapter_files("demo/sd"))
    world.put("me/twin", adapter_files("demo/sd"))
    catalog = world.catalog()
    await pictures(world, catalog).keep(ref("me/style"), b"drawn", token=None)
    assert await found(world, world.catalog(), "me/twin") == b"drawn"
    world.put("me/style", adapter_files("demo/sd", lora(rank=2)))
    assert await found(world, world.catalog(), "me/style") is None
