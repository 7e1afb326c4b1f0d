from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from serve_app.catalog.reading.header import FIRST_RANGE_BYTES
from serve_app.catalog.reading.repository import RepositoryListing
from serve_app.catalog.sources.hub import HubSource
from serve_app.catalog.sources.remote_calls import DOWNLOAD, LOOK_UP, RemoteCalls
from serve_app.core import AdapterSpec
from serve_app.errors import AccessDenied, HubUnavailable, ModelNotFound
from serve_app.refusals import MalformedFile
from serve_app.source_settings import HubSettings
from tests.hub_server import CDN, FILE, INFO, ErrorDetail, HubServer
from tests.unit.catalog.builders import WEIGHTS, adapter_files, lora

ID = "me/sketch"
TOKEN = "hf_secret"


def client(
    hub: HubServer, cache: Path, *, token: str | None = None, calls: RemoteCalls | None = None, **settings: float
) -> HubSource:
    return HubSource(
        HubSettings.model_validate({"endpoint": hub.endpoint, "timeout_s": 60} | settings),
        token=token,
        cache_dir=cache,
        calls=calls,
    )


async def found(places: HubSource, model: str = ID, revision: str | None = None) -> RepositoryListing:
    listing = await places.find(model, revision)
    assert listing is not None
    return listing


def spec(revision: str, filename: str = WEIGHTS, location: str = ID) -> AdapterSpec:
    return AdapterSpec(ID, "demo/sd", revision, filename, "hub", location, 0)


async def test_a_repository_is_found_at_its_commit_with_card_sizes_and_computed_tags(hub: HubServer, tmp_path: Path):
    commit = hub.push(ID, adapter_files("demo/sd"), tags=("base_model:adapter:demo/sd",))
    listing = await found(client(hub, tmp_path))
    assert (listing.revision, listing.location, listing.origin) == (commit, ID, "hub")
    assert listing.card.base_models == listing.card.adapter_tag_bases == ("demo/sd",)
    assert listing.file(WEIGHTS).size_bytes == len(lora())  # type: ignore[union-attr]


async def test_a_header_is_read_by_range_and_the_weights_stay_where_they_are(hub: HubServer, tmp_path: Path):
    big = lora(2048, hidden=None, rank=512)
    assert len(big) > 8 * FIRST_RANGE_BYTES
    hub.push(ID, adapter_files("demo/sd", big))
    places = client(hub, tmp_path)
    header = await places.header(await found(places), WEIGHTS)
    assert [entry.shape for entry in header.tensors.values()] == [(512, 2048), (32, 512)]
    assert [request.range for request in hub.requests if request.kind == CDN] == [f"bytes=0-{FIRST_RANGE_BYTES - 1}"]


async def test_a_header_longer_than_the_first_range_is_asked_for_again_whole(hub: HubServer, tmp_path: Path):
    long = lora(64, note="x" * FIRST_RANGE_BYTES)
    hub.push(ID, adapter_files("demo/sd", long))
    places = client(hub, tmp_path)
    header = await places.header(await found(places), WEIGHTS)
    assert len(header.metadata["note"]) == FIRST_RANGE_BYTES
    assert hub.count(kind=CDN) == 2


async def test_no_more_than_a_header_is_read_where_ranges_are_ignored(hub: HubServer, tmp_path: Path):
    big = lora(2048, hidden=None, rank=2048)
    hub.push(ID, adapter_files("demo/sd", big))
    places = client(hub, tmp_path, timeout_s=30)
    listing = await found(places)
    # At this rate the whole file would take twice the time there is.
    hub.fail(ID, ErrorDetail(ignores_range=True, bytes_per_s=len(big) / 60))
    assert len((await places.header(listing, WEIGHTS)).tensors) == 2


async def test_a_file_is_downloaded_once_and_by_commit(hub: HubServer, tmp_path: Path):
    first = hub.push(ID, adapter_files("demo/sd", lora(rank=4)))
    second = hub.push(ID, adapter_files("demo/sd", lora(rank=8)))
    places = client(hub, tmp_path)
    assert (await places.download(spec(first))).read_bytes() == lora(rank=4)
    assert (await places.download(spec(second))).read_bytes() == lora(rank=8)
    before = hub.count()
    assert (await places.download(spec(first))).read_bytes() == lora(rank=4)
    assert hub.count() == before


async def test_a_branch_a_tag_and_a_commit_can_be_asked_for(hub: HubServer, tmp_path: Path):
    main = hub.push(ID, adapter_files("demo/sd"))
    other = hub.push(ID, adapter_files("big", lora(112)), branch="refs/pr/1")
    places = client(hub, tmp_path)
    assert (await found(places)).revision == main
    assert (await found(places, revision="refs/pr/1")).revision == other
    assert (await found(places, revision=main)).revision == main
    with pytest.raises(ModelNotFound, match="no revision 'v9'"):
        await places.find(ID, "v9")
    with pytest.raises(ModelNotFound, match="revision"):
        await places.find(ID, "../../x")


async def test_a_renamed_repository_is_found_under_both_names(hub: HubServer, tmp_path: Path):
    commit = hub.push("old/name", adapter_files("demo/sd"))
    hub.rename("old/name", "new/name")
    places = client(hub, tmp_path)
    listing = await found(places, "old/name")
    assert (listing.id, listing.location) == ("old/name", "new/name")
    await places.header(listing, WEIGHTS)
    assert (await places.download(spec(commit, location="new/name"))).read_bytes() == lora()


async def test_what_the_hub_does_not_have_is_nothing_with_and_without_a_token(hub: HubServer, tmp_path: Path):
    assert await client(hub, tmp_path).find("no/body", None) is None
    assert await client(hub, tmp_path, token=TOKEN).find("no/body", None) is None
    before = hub.count()
    assert await client(hub, tmp_path).find("../etc/passwd", None) is None
    assert hub.count() == before, "a name that is no id never leaves the process"


async def test_a_private_repository_is_there_for_its_token_alone(hub: HubServer, tmp_path: Path):
    hub.push(ID, adapter_files("demo/sd"))
    hub.hide(ID, tokens=frozenset({TOKEN}))
    assert await client(hub, tmp_path / "a").find(ID, None) is None
    assert (await found(client(hub, tmp_path / "b", token=TOKEN))).id == ID


@pytest.mark.parametrize("token", [None, "hf_stranger"])
async def test_a_gated_repository_is_denied(hub: HubServer, tmp_path: Path, token: str | None):
    commit = hub.push(ID, adapter_files("demo/sd"))
    hub.gate(ID, tokens=frozenset({TOKEN}))
    places = client(hub, tmp_path, token=token)
    listing = await found(places)
    with pytest.raises(AccessDenied, match=ID):
        await places.header(listing, WEIGHTS)
    with pytest.raises(AccessDenied, match=ID):
        await places.download(spec(commit))
    assert (await client(hub, tmp_path / "other", token=TOKEN).download(spec(commit))).read_bytes() == lora()


async def test_the_token_goes_to_the_hub_and_never_to_its_cdn_nor_into_a_message(hub: HubServer, tmp_path: Path):
    commit = hub.push(ID, adapter_files("demo/sd"))
    places = client(hub, tmp_path, token=TOKEN)
    await places.header(await found(places), WEIGHTS)
    await places.download(spec(commit))
    assert {request.token for request in hub.requests if request.kind in (INFO, FILE)} == {TOKEN}
    assert {request.token for request in hub.requests if request.kind == CDN} == {None}
    hub.fail(ID, ErrorDetail(status=500))
    with pytest.raises(HubUnavailable) as refusal:
        await client(hub, tmp_path / "empty", token=TOKEN).find(ID, None)
    for secret in (TOKEN, hub.endpoint, "127.0.0.1", str(tmp_path)):
        assert secret not in str(refusal.value)


async def test_a_token_that_lies_about_on_the_machine_is_not_sent(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = hub.push(ID, adapter_files("demo/sd"))
    places = client(hub, tmp_path, token=None)
    await places.header(await found(places), WEIGHTS)
    await places.download(spec(commit))
    assert {request.token for request in hub.requests} == {None}


@pytest.mark.parametrize("status", [500, 503])
async def test_a_hub_in_trouble_is_asked_a_few_times_and_then_unavailable_whatever_is_asked(
    hub: HubServer, tmp_path: Path, status: int
):
    commit = hub.push(ID, adapter_files("demo/sd"))
    places = client(hub, tmp_path)
    listing = await found(places)
    hub.fail(ID, ErrorDetail(status=status))
    asked_before = hub.count()
    for call in (places.header(listing, WEIGHTS), places.download(spec(commit))):
        with pytest.raises(HubUnavailable, match=f"status {status}"):
            await call
    with pytest.raises(HubUnavailable, match=f"status {status}"):
        await client(hub, tmp_path / "empty").find(ID, None)
    assert hub.count() - asked_before == 2 * LOOK_UP.tries + DOWNLOAD.tries


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "7"}, "7"),
        ({"retry-after": "9999"}, "120"),
        ({"ratelimit": '"api";r=0;t=44'}, "44"),
        ({"retry-after": "soon"}, "10"),
        ({}, "10"),
    ],
)
async def test_a_hub_that_limits_requests_is_asked_once_and_then_left_alone_for_as_long_as_it_said(
    hub: HubServer, tmp_path: Path, headers: dict[str, str], wait_s: str
):
    hub.push(ID, adapter_files("demo/sd"))
    hub.fail(ID, ErrorDetail(status=429, headers=headers))
    places = client(hub, tmp_path, calls=RemoteCalls(clock=lambda: 0.0))
    for _ in range(3):
        with pytest.raises(HubUnavailable, match=f"limiting requests; try again in {wait_s} s"):
            await places.find(ID, None)
    assert hub.count() == 1


async def test_a_date_is_as_good_as_seconds_to_say_when_to_come_back(hub: HubServer, tmp_path: Path):
    hub.push(ID, adapter_files("demo/sd"))
    # A clock of its own, by which it counts.
    now = datetime.now(UTC) - timedelta(hours=1)
    dates = [format_datetime(now + timedelta(seconds=seconds), usegmt=True) for seconds in (0, 60)]
    hub.fail(ID, ErrorDetail(status=429, headers={"date": dates[0], "retry-after": dates[1]}))
    with pytest.raises(HubUnavailable) as refusal:
        await client(hub, tmp_path).find(ID, None)
    assert refusal.value.retry_after_s == 60


async def test_a_date_is_read_by_our_own_clock_where_the_hub_does_not_tell_its_own(hub: HubServer, tmp_path: Path):
    hub.push(ID, adapter_files("demo/sd"))
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    hub.fail(ID, ErrorDetail(status=429, headers={"retry-after": date}))
    with pytest.raises(HubUnavailable) as refusal:
        await client(hub, tmp_path).find(ID, None)
    assert 20 <= refusal.value.retry_after_s <= 60


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_without_a_code_is_a_denial(hub: HubServer, tmp_path: Path, status: int):
    hub.push(ID, adapter_files("demo/sd"))
    hub.fail(ID, ErrorDetail(status=status))
    with pytest.raises(AccessDenied):
        await client(hub, tmp_path).find(ID, None)


async def test_a_hub_that_hangs_is_given_up_after_its_time(hub: HubServer, tmp_path: Path):
    commit = hub.push(ID, adapter_files("demo/sd"))
    listing = await found(client(hub, tmp_path))
    hub.hold(ID)
    places = client(hub, tmp_path / "empty", timeout_s=0.3)
    for call in (places.find(ID, None), places.header(listing, WEIGHTS), places.download(spec(commit))):
        started = time.monotonic()
        with pytest.raises(HubUnavailable):
            async with asyncio.timeout(60):
                await call
        assert time.monotonic() - started > 0.2


async def test_a_hub_that_trickles_is_given_up_after_its_time(hub: HubServer, tmp_path: Path):
    commit = hub.push(ID, adapter_files("demo/sd", lora(2048, rank=64)))
    listing = await found(client(hub, tmp_path))
    hub.fail(ID, ErrorDetail(bytes_per_s=2000))
    places = client(hub, tmp_path / "empty", timeout_s=0.4, download_timeout_s=0.6)
    for call, limit in ((places.header(listing, WEIGHTS), r"0\.4 s"), (places.download(spec(commit)), r"0\.6 s")):
        # A Hub that is itself held up is silent for longer than it may be.
        with pytest.raises(HubUnavailable, match=rf"{limit}|in time"):
            async with asyncio.timeout(30):
                await call


async def test_a_hub_that_is_gone_is_unavailable(hub: HubServer, tmp_path: Path):
    hub.push(ID, adapter_files("demo/sd"))
    hub.down()
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        await client(hub, tmp_path).find(ID, None)


async def test_what_was_seen_is_seen_again_after_a_restart_without_the_hub(hub: HubServer, tmp_path: Path):
    commit = hub.push(ID, adapter_files("demo/sd"))
    places = client(hub, tmp_path)
    listing = await found(places)
    header = await places.header(listing, WEIGHTS)
    await places.download(spec(commit))
    hub.down()
    restarted = client(hub, tmp_path)
    assert await found(restarted) == listing
    assert await restarted.header(listing, WEIGHTS) == header
    assert (await restarted.download(spec(commit))).read_bytes() == lora()


async def test_a_file_shorter_than_its_header_says_is_malformed_before_any_download(hub: HubServer, tmp_path: Path):
    hub.push(ID, adapter_files("demo/sd", lora()[:-3]))
    places = client(hub, tmp_path)
    with pytest.raises(MalformedFile, match="truncated"):
        await places.header(await found(places), WEIGHTS)


@pytest.mark.parametrize("content", [b"", b"123", b"\xff" * 64, b"<html>not weights</html>"])
async def test_a_file_that_is_no_safetensors_is_malformed(hub: HubServer, tmp_path: Path, content: bytes):
    hub.push(ID, adapter_files("demo/sd", content))
    places = client(hub, tmp_path)
    with pytest.raises(MalformedFile):
        await places.header(await found(places), WEIGHTS)


async def test_a_small_file_is_read_whole_and_a_missing_one_is_nothing(hub: HubServer, tmp_path: Path):
    hub.push("my/base", {"unet/config.json": b'{"a": 1}'})
    places = client(hub, tmp_path)
    assert await places.read_small("my/base", None, "unet/config.json") == b'{"a": 1}'
    assert await places.read_small("my/base", None, "transformer/config.json") is None
    assert await places.read_small("no/base", None, "unet/config.json") is None
