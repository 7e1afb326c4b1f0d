from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.catalog.sources.bucket import READ_BYTES, Bucket, ObjectChanged, StorePackageMissing, check_stores
from serve_app.catalog.sources.object_stores import ObjectStoreSource
from serve_app.catalog.sources.remote_calls import RemoteCalls
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound, StoreAccessDenied, StoreUnavailable
from serve_app.source_settings import AdapterSources, AdapterStore
from tests.clock import Clock
from tests.s3_server import Fault, Request, S3Server
from tests.unit.catalog.builders import WEIGHTS, adapter_files, lora

INK = "styles/Ink Wash v1.0 (final)"
BIG = bytes(range(256)) * (READ_BYTES // 256) + b"the end"


def named(part: str, method: str = "GET") -> Callable[[Request], bool]:
    return lambda request: request.method == method and part in request.path


def is_second_part(request: Request) -> bool:
    return str(request.range).startswith(f"bytes={READ_BYTES}-")


class Stores:
    """Sources over the test's buckets, with one cache on disk and one clock."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.clock = Clock(1000.0)

    def source(self, *buckets: str, **settings: object) -> ObjectStoreSource:
        stores = [{"url": f"s3://{bucket}", "timeout_s": 20, **settings} for bucket in buckets]

        def calls_to(bucket: Bucket) -> RemoteCalls:
            return RemoteCalls(bucket.remote, clock=self.clock, sleep=lambda _: None)

        sources = AdapterSources.model_validate({"stores": stores})
        return ObjectStoreSource(sources, cache_dir=self.cache, calls_to=calls_to)


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    return Stores(tmp_path / "cache")


async def spec_of(source: ObjectStoreSource, model: str, *, revision: str | None = None) -> AdapterSpec:
    listing = await source.find(model, revision)
    assert listing is not None
    filename = next(file.name for file in listing.files if file.name.endswith(".safetensors"))
    revision = await source.resolve_revision(listing, filename)
    return AdapterSpec(model, "demo/sd", revision, filename, "store", listing.location, 0)


async def test_a_bucket_laid_out_as_the_hub_gives_card_header_and_bytes(s3: S3Server, stores: Stores) -> None:
    files = adapter_files("demo/sd", lora(rank=8)) | {"adapter_config.json": b'{"r": 8}'}
    bucket = s3.bucket({f"pre/me/ink/{name}": content for name, content in files.items()} | {"other/x/y/z": b""})
    source = stores.source(f"{bucket}/pre")
    assert set(await source.marks()) == {"me/ink"}
    listing = await source.find("me/ink", None)
    assert listing is not None
    assert listing.card.base_models == ("demo/sd",)
    assert len((await source.header(listing, WEIGHTS)).tensors) == 4
    assert await source.read_small(listing.location, None, "adapter_config.json") == b'{"r": 8}'
    spec = await spec_of(source, "me/ink")
    assert f'"{spec.revision}"' == s3.client("s3").head_object(Bucket=bucket, Key=f"pre/me/ink/{WEIGHTS}")["ETag"]
    assert (await source.download(spec)).read_bytes() == files[WEIGHTS]


async def test_in_a_flat_bucket_each_file_is_an_adapter_with_its_sidecars(s3: S3Server, stores: Stores) -> None:
    sidecar = json.dumps({"activation text": "inkwash", "sd version": "SD1"}).encode()
    names = ("top", INK, "a/b/c/deep")
    files = {f"{name}.safetensors": lora() for name in names}
    bucket = s3.bucket(files | {f"{INK}.json": sidecar, "top_emb.safetensors": lora(), ".hidden/x.safetensors": lora()})
    source = stores.source(bucket, layout="flat")
    assert set(await source.marks()) == set(names)
    listing = await source.find(INK, None)
    assert listing is not None
    assert listing.card.defaults.trigger_words == "inkwash"
    for name in names:
        assert (await source.download(await spec_of(source, name))).read_bytes() == lora()
    top = await source.find("top", None)
    assert top is not None
    assert [file.name for file in top.files] == ["top.safetensors", "top_emb.safetensors"]


async def test_above_repositories_files_are_names_and_the_first_bucket_wins(s3: S3Server, stores: Stores) -> None:
    first = s3.bucket({"loose.safetensors": lora(rank=2), "me/ink.safetensors": lora(), f"me/ink/{WEIGHTS}": lora()})
    second = s3.bucket({"loose.safetensors": lora(), "only.safetensors": lora()})
    source = stores.source(first, second)
    assert set(await source.marks()) == {"loose", "me/ink", "only"}
    assert (await source.download(await spec_of(source, "loose"))).read_bytes() == lora(rank=2)
    assert (await spec_of(source, "me/ink")).filename == WEIGHTS


@pytest.mark.parametrize("model", ["missing", "../pre/a", "pre/../a", "/a", "", "a/", "a\nb", "s3://bucket/a"])
async def test_a_name_that_is_not_there_or_climbs_finds_nothing(s3: S3Server, stores: Stores, model: str) -> None:
    source = stores.source(f"{s3.bucket({'pre/a.safetensors': lora(), 'a.safetensors': lora()})}/pre")
    assert await source.find(model, None) is None


async def test_a_thousand_adapters_are_listed_in_one_pass_of_pages_and_no_object_is_read(
    s3: S3Server, stores: Stores
) -> None:
    weights, card = lora(), adapter_files("demo/sd")["README.md"]
    files = {
        f"me/{at}/{name}": content for at in range(1000) for name, content in ((WEIGHTS, weights), ("README.md", card))
    }
    source = stores.source(s3.bucket(files))
    found = await asyncio.gather(source.marks(), source.marks(), source.find("missing", None))
    assert len(found[0]) == 1000
    assert (len(s3.requests), s3.listings) == (2, 2)


async def test_what_was_read_once_is_asked_for_again_by_no_process(s3: S3Server, stores: Stores) -> None:
    bucket = s3.bucket({f"me/ink/{name}": content for name, content in adapter_files("demo/sd").items()})
    for is_first in (True, False):
        source = stores.source(bucket)
        listing = await source.find("me/ink", None)
        assert listing is not None
        await source.header(listing, WEIGHTS)
        await source.download(await spec_of(source, "me/ink"))
        assert s3.count("GET", "me/ink") == (3 if is_first else 0)
        s3.requests.clear()


async def test_objects_that_appear_change_or_go_are_noticed_after_the_listings_time(
    s3: S3Server, stores: Stores
) -> None:
    bucket = s3.bucket({"a.safetensors": lora(), "b.safetensors": lora()})
    source = stores.source(bucket)
    before = await source.marks()
    s3.put(bucket, {"a.safetensors": lora(rank=2), "c.safetensors": lora()})
    s3.remove(bucket, "b.safetensors")
    assert await source.marks() == before
    stores.clock.now += 30
    after = await source.marks()
    assert set(after) == {"a", "c"}
    assert after["a"] != before["a"]


async def test_a_revision_is_the_newest_or_is_not_found(s3: S3Server, stores: Stores) -> None:
    source = stores.source(s3.bucket({"a.safetensors": lora()}))
    revision = (await spec_of(source, "a")).revision
    assert (await spec_of(source, "a", revision=revision[:8])).revision == revision
    with pytest.raises(ModelNotFound, match="only the newest"):
        await spec_of(source, "a", revision="v2")


async def test_an_object_that_was_replaced_after_its_look_up_is_refused_until_it_is_listed_again(
    s3: S3Server, stores: Stores
) -> None:
    bucket = s3.bucket({"a.safetensors": lora()})
    source = stores.source(bucket)
    spec, listing = await spec_of(source, "a"), await source.find("a", None)
    assert listing is not None
    s3.put(bucket, {"a.safetensors": lora(rank=2)})
    for call in (source.download(spec), source.header(listing, "a.safetensors")):
        with pytest.raises(ObjectChanged, match=r"^a could not be fetched.*try again in 30 s"):
            await call
    stores.clock.now += 30
    assert (await source.download(await spec_of(source, "a"))).read_bytes() == lora(rank=2)


async def test_bytes_of_two_versions_are_never_mixed(s3: S3Server, stores: Stores) -> None:
    bucket = s3.bucket({"a.safetensors": BIG})
    source = stores.source(bucket)
    spec = await spec_of(source, "a")

    s3.fault = Fault(is_second_part, before=lambda: s3.put(bucket, {"a.safetensors": BIG[::-1]}))
    with pytest.raises(ObjectChanged):
        await source.download(spec)
    assert list(stores.cache.glob("hub/*.safetensors")) == []


async def test_a_download_that_breaks_off_goes_on_where_it_stopped(s3: S3Server, stores: Stores) -> None:
    source = stores.source(s3.bucket({"a.safetensors": BIG}))
    spec = await spec_of(source, "a")
    s3.fault = Fault(is_second_part, cuts_body=True, times=2)
    assert (await source.download(spec)).read_bytes() == BIG
    assert s3.fault.times == 0
    assert sum(str(request.range).startswith("bytes=0-") for request in s3.requests) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(named("a.safetensors"), cuts_body=True), "broke off"),
        (Fault(named("a.safetensors"), alters_body=True), "not the object that the store names"),
        (Fault(named("a.safetensors"), status="503 Slow Down"), "failed"),
        (Fault(named("a.safetensors"), status="404 Not Found"), "no longer in the store"),
    ],
    ids=["truncated", "altered", "overloaded", "gone"],
)
async def test_what_stays_broken_is_refused_and_nothing_is_kept(
    s3: S3Server, stores: Stores, fault: Fault, said: str
) -> None:
    source = stores.source(s3.bucket({"a.safetensors": lora()}))
    spec = await spec_of(source, "a")
    s3.fault = fault
    with pytest.raises((StoreUnavailable, ModelNotFound), match=said) as refusal:
        await source.download(spec)
    assert not any(part in str(refusal.value) for part in (spec.location, s3.endpoint, "127.0.0.1"))
    assert list(stores.cache.glob("hub/*.safetensors")) == []


async def test_an_etag_that_is_no_digest_is_not_held_against_the_bytes(s3: S3Server, stores: Stores) -> None:
    bucket = s3.bucket({})
    s3.put(bucket, {"key.safetensors": lora()}, etag="ab" * 16, encryption="aws:kms")
    s3.put(bucket, {"parts.safetensors": lora()}, etag=f"{'ab' * 16}-3")
    s3.put(bucket, {"wrong.safetensors": lora()}, etag="ab" * 16)
    source = stores.source(bucket)
    for model in ("key", "parts"):
        assert (await source.download(await spec_of(source, model))).read_bytes() == lora()
    with pytest.raises(StoreUnavailable, match="not the object"):
        await source.download(await spec_of(source, "wrong"))


async def test_what_the_services_credentials_do_not_open_is_denied(
    s3: S3Server, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket({"open.safetensors": lora(), "shut.safetensors": lora()})
    listing = {"Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{bucket}"}
    reading = {"Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/open*"}
    with s3.only_letting(listing, reading) as keys:
        s3.set_up(monkeypatch, **keys)
        source = stores.source(bucket)
        assert (await source.download(await spec_of(source, "open"))).read_bytes() == lora()
        with pytest.raises(StoreAccessDenied, match="the service's credentials"):
            await source.download(await spec_of(source, "shut"))
        s3.set_up(monkeypatch, AWS_ACCESS_KEY_ID=keys["AWS_ACCESS_KEY_ID"], AWS_SECRET_ACCESS_KEY="wrong")
        with pytest.raises(StoreUnavailable, match="does not let the service list") as refusal:
            await stores.source(s3.bucket({})).find("open", None)
        assert keys["AWS_ACCESS_KEY_ID"] not in str(refusal.value)


async def test_a_store_that_is_down_is_listed_as_last_seen_also_after_a_restart(s3: S3Server, stores: Stores) -> None:
    bucket = s3.bucket({"a.safetensors": lora()})
    source = stores.source(bucket)
    listing = await source.find("a", None)
    s3.fault = Fault(lambda _: True, status="503 Slow Down")
    stores.clock.now += 30
    for known in (source, stores.source(bucket)):
        assert await known.find("a", None) == listing
        assert await known.find("b", None) is None
    for kept in stores.cache.glob("store-memory/headers/*/objects"):
        kept.write_bytes(b"[[1]]")
    with pytest.raises(StoreUnavailable):
        await stores.source(bucket).find("a", None)


async def test_a_store_that_was_never_listed_hides_no_name_and_is_asked_again_after_a_while(
    s3: S3Server, stores: Stores
) -> None:
    source = stores.source(s3.bucket({"a.safetensors": lora()}))
    s3.fault = Fault(lambda _: True, status="503 Slow Down")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="try again in 15 s"):
            await source.find("me/of-the-hub", None)
    assert s3.listings == 3  # tries of one look-up
    s3.fault = None
    stores.clock.now += 15
    assert await source.find("me/of-the-hub", None) is None
    assert await source.find("a", None) is not None


async def test_a_store_that_does_not_answer_costs_the_time_that_is_set(s3: S3Server, stores: Stores) -> None:
    bucket = s3.bucket({"a.safetensors": lora()})
    spec = await spec_of(stores.source(bucket), "a")
    hung = threading.Event()
    s3.fault = Fault(lambda _: True, until=hung)
    try:
        with pytest.raises(StoreUnavailable, match=r"did not answer in time|longer than"):
            await stores.source(s3.bucket({}), timeout_s=0.3).find("a", None)
        with pytest.raises(StoreUnavailable, match=r"longer than 0.3 s"):
            await stores.source(bucket, download_timeout_s=0.3).download(spec)
    finally:
        hung.set()


@pytest.mark.parametrize(
    ("environment", "bucket", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_CONFIG_FILE": "/", "AWS_SHARED_CREDENTIALS_FILE": "/"}, None, "no credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, None, "cannot be reached"),
        ({}, "not-there", "does not exist"),
    ],
)
async def test_what_keeps_a_bucket_from_being_listed_is_said(
    s3: S3Server,
    stores: Stores,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    bucket: str | None,
    said: str,
) -> None:
    s3.set_up(monkeypatch, **environment)
    with pytest.raises(StoreUnavailable, match=said):
        await stores.source(bucket or s3.bucket({})).find("a", None)


def test_a_kind_of_store_whose_package_is_missing_names_the_extra() -> None:
    check_stores([AdapterStore(url="s3://bucket")])
    with pytest.raises(StorePackageMissing, match=r"gs://bucket.*loraplex\[gs\]"):
        check_stores([AdapterStore(url="s3://bucket"), AdapterStore(url="gs://bucket/prefix")])
