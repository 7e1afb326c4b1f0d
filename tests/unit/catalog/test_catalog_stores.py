"""A bucket of an object store through the catalog, beside a folder and the Hub."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.catalog.catalog import Catalog
from serve_app.catalog.files import AdapterFiles
from serve_app.catalog.reading.repository import STORE
from serve_app.catalog.resolving.background_index import BackgroundIndex
from serve_app.core import HubToken
from serve_app.errors import ModelNotFound, StoreAccessDenied, StoreUnavailable
from tests.s3_server import Fault, S3Server
from tests.unit.catalog.builders import WEIGHTS, World, adapter_files, lora, ref


def bucket_of(s3: S3Server, **adapters: dict[str, bytes]) -> str:
    return s3.bucket(
        {f"acme/{one}/{name}": content for one, files in adapters.items() for name, content in files.items()}
    )


def catalog_over(world: World, bucket: str, **more: object) -> Catalog:
    return world.catalog(world.config(stores=({"url": f"s3://{bucket}", "timeout_s": 60},), **more))


async def listed(catalog: Catalog) -> list[str]:
    return [known.spec.id for known in await catalog.known(wait_s=None)]


async def test_a_bucket_is_served_with_one_line_and_lists_what_can_be_served(s3: S3Server, world: World) -> None:
    card = adapter_files("demo/sd", instance_prompt="inkwash")
    bucket = bucket_of(s3, ink=card, other=adapter_files("not/served"), notes={"notes.txt": b"x"})
    s3.put(bucket, {"loose.safetensors": lora()})
    config = world.config(stores=({"url": f"s3://{bucket}", "timeout_s": 60},))
    catalog = world.catalog(config)
    assert await listed(catalog) == ["acme/ink", "loose"]
    (use,) = (await catalog.resolve("acme/ink", ())).adapters
    assert (use.spec.origin, use.spec.base_id, use.spec.defaults.trigger_words) == ("store", "demo/sd", "inkwash")
    files = AdapterFiles(world.places(config))
    assert (await files.path(use.spec)).read_bytes() == card[WEIGHTS]
    files.release(use.spec)
    assert files.free_space(1) == len(card[WEIGHTS])


async def test_a_bucket_is_looked_up_several_adapters_at_once(s3: S3Server, world: World) -> None:
    bucket = bucket_of(s3, **{name: adapter_files("demo/sd") for name in "abc"})
    sources = world.places(world.config(stores=({"url": f"s3://{bucket}"},)))
    together = asyncio.Barrier(3)

    async def look_up(model: str) -> None:
        await together.wait()

    index = BackgroundIndex([source for source in sources if source.origin == STORE], look_up)
    async with asyncio.timeout(60):
        await index.refresh(None)
    assert sorted(index.ids) == ["acme/a", "acme/b", "acme/c"]


async def test_folders_go_before_buckets_and_buckets_before_the_hub(s3: S3Server, world: World) -> None:
    bucket = bucket_of(s3, both=adapter_files("demo/sd", lora(rank=3)), mine=adapter_files("demo/sd", lora(rank=3)))
    world.put("acme/both", adapter_files("demo/sd", lora(rank=2)))
    for name in ("mine", "hubs"):
        world.hub.push(f"acme/{name}", adapter_files("demo/sd", lora(rank=5)))
    catalog = catalog_over(world, bucket)
    known = [await catalog.lookup_adapter(ref(f"acme/{name}")) for name in ("both", "mine", "hubs")]
    assert [(one.spec.origin, one.rank) for one in known] == [("folder", 2), ("store", 3), ("hub", 5)]


async def test_no_adapter_of_the_hub_stands_in_for_one_of_a_store_that_is_away(s3: S3Server, world: World) -> None:
    bucket = bucket_of(s3, mine=adapter_files("demo/sd"))
    world.hub.push("acme/mine", adapter_files("demo/sd"))
    world.put("acme/own", adapter_files("demo/sd"))
    s3.fault = Fault(lambda request: bucket in request.path, status="503 Slow Down")
    catalog = catalog_over(world, bucket)
    assert (await catalog.adapter(ref("acme/own"))).origin == "folder"
    with pytest.raises(StoreUnavailable) as refusal:
        await catalog.adapter(ref("acme/mine"))
    assert (refusal.value.status, refusal.value.retry_after) == (503, True)
    assert world.hub.count("acme/mine") == 0


async def test_a_callers_token_opens_nothing_that_the_store_denies_to_the_service(
    s3: S3Server, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = bucket_of(s3, mine=adapter_files("demo/sd"))
    world.hub.push("acme/mine", adapter_files("demo/sd"))
    world.hub_settings["forward_tokens"] = True
    catalog = catalog_over(world, bucket)
    with s3.only_letting({"Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{bucket}"}) as keys:
        s3.set_up(monkeypatch, **keys)
        with pytest.raises(StoreAccessDenied, match="the service's credentials"):
            await catalog.lookup_adapter(ref("acme/mine"), token=HubToken("hf_" + "a" * 20))


@pytest.mark.parametrize("name", ["s3://adapters/acme/ink", "s3:adapters", "127.0.0.1:9/x", "gs://b/x"])
async def test_a_request_names_no_address(s3: S3Server, world: World, name: str) -> None:
    catalog = catalog_over(world, bucket_of(s3, ink=adapter_files("demo/sd")))
    with pytest.raises(ModelNotFound):
        await catalog.resolve(name, ())
    assert all(request.is_listing for request in s3.requests)
