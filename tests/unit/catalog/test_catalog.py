from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator

import numpy as np
import pytest
from safetensors.numpy import save

from serve_app.catalog.files import AdapterFiles
from serve_app.config import AppConfig, BaseModelConfig
from serve_app.errors import BaseMismatch, BaseRemoved, LoraplexError, ModelNotFound, TooLarge
from serve_app.refusals import (
    AmbiguousFile,
    BaseNotServed,
    MalformedFile,
    NoLayerMatches,
    NotAnAdapter,
    RankTooHigh,
    ShapeMismatch,
    UnsafeFile,
)
from tests.unit.catalog.builders import (
    SDXL_TEXT,
    WEIGHTS,
    World,
    adapter_files,
    base_files,
    card,
    lora,
    pair,
    ref,
    write_files,
)

SDXL_LORA = lora(SDXL_TEXT, hidden=48)
# What naming two known adapters may take: turns of the event loop, and calls of functions.
MAX_TURNS, MAX_CALLS = 10, 1000


# Which base


async def test_a_base_is_meant_by_its_id_its_alias_or_nothing(world: World):
    catalog = world.catalog()
    for name in ("demo/sd", "small", "old-owner/sd", None):
        resolution = await catalog.resolve(name, ())
        assert (resolution.base.id, resolution.adapters) == ("demo/sd", ())
    assert (await catalog.resolve("big", ())).base.id == "big"
    assert world.hub.count() == 0
    assert [base.id for base in catalog.served()] == ["demo/sd", "big"]


@pytest.mark.parametrize("place", ["folder", "hub"])
async def test_an_adapter_is_found_with_its_base_file_and_revision(world: World, place: str):
    files = adapter_files("demo/sdxl", SDXL_LORA, instance_prompt="a sketch of") | {"x.txt": b""}
    files["README.md"] = card("big", instance_prompt="a sketch of")
    if place == "folder":
        world.put("me/sketch", files)
    else:
        commit = world.hub.push("me/sketch", files)
    resolution = await world.catalog().resolve("me/sketch", ())
    (use,) = resolution.adapters
    assert (resolution.base.id, use.scale) == ("big", 1.0)
    assert (use.spec.id, use.spec.base_id, use.spec.filename) == ("me/sketch", "big", WEIGHTS)
    assert (use.spec.origin, use.spec.defaults.trigger_words) == (place, "a sketch of")
    assert use.spec.size_bytes == len(SDXL_LORA)
    assert len(use.spec.revision) == 40
    assert place == "folder" or use.spec.revision == commit
    path = await AdapterFiles(world.places()).path(use.spec)
    assert path.read_bytes() == SDXL_LORA


async def test_embedded_adapters_are_found_where_they_are_switched_on(world: World):
    write_files(world.folder / "demo-root" / "demo" / "sd-night", adapter_files("demo/sd"))
    spec = await world.catalog().adapter(ref("demo/sd-night"))
    assert (spec.origin, spec.base_id) == ("embedded", "demo/sd")
    with pytest.raises(ModelNotFound):
        await world.catalog(world.config(embedded=False)).adapter(ref("demo/sd-night"))


async def test_a_folder_is_asked_before_the_hub(world: World):
    world.put("me/sketch", adapter_files("demo/sd"))
    world.hub.push("me/sketch", adapter_files("big", SDXL_LORA))
    assert (await world.catalog().adapter(ref("me/sketch"))).origin == "folder"
    assert world.hub.count() == 0


@pytest.mark.parametrize(
    "readme",
    [
        card("demo/sd"),
        card(["demo/sd"]),
        card(["someone/else", "demo/sd"]),
        card("old-owner/sd"),
        card("Demo/SD"),
        card("https://huggingface.co/demo/sd"),
        card(None, tags=("base_model:adapter:demo/sd",)),
        card("someone/else", tags=("base_model:adapter:demo/sd",)),
        card("demo/sd", base_model_relation="adapter", tags=()),
        card(None),
        b"no card at all",
    ],
)
async def test_the_base_is_told_by_card_tags_or_structure(world: World, readme: bytes):
    world.put("me/sketch", {"README.md": readme, WEIGHTS: lora()})
    assert (await world.catalog().resolve("me/sketch", ())).base.id == "demo/sd"


async def test_a_card_may_name_a_base_by_the_source_it_is_configured_with(world: World):
    config = AppConfig(
        bases=(BaseModelConfig.model_validate({"id": "mine", "source": {"embedded": "demo/sd"}}),),
        adapters=world.config().adapters,
    )
    world.put("me/sketch", adapter_files("demo/sd"))
    assert (await world.catalog(config).resolve("me/sketch", ())).base.id == "mine"


async def test_a_fine_tune_of_a_served_base_leads_to_that_base(world: World):
    world.hub.push("tuned/one", {"README.md": card("demo/sd", base_model_relation="finetune")})
    world.hub.push("tuned/two", {"README.md": card("tuned/one")})
    world.hub.push("me/sketch", adapter_files("tuned/two"))
    assert (await world.catalog().adapter(ref("me/sketch"))).base_id == "demo/sd"


async def test_a_chain_of_fine_tunes_is_followed_three_steps_and_never_in_a_circle(world: World):
    for step in range(6):
        world.hub.push(f"tuned/{step}", {"README.md": card(f"tuned/{step + 1}")})
    world.hub.push("tuned/6", {"README.md": card("demo/sd")})
    world.hub.push("tuned/a", {"README.md": card("tuned/b")})
    world.hub.push("tuned/b", {"README.md": card("tuned/a")})
    world.hub.push("me/long", adapter_files("tuned/0"))
    world.hub.push("me/circle", adapter_files("tuned/a"))
    catalog = world.catalog()
    with pytest.raises(BaseNotServed, match="tuned/0"):
        await catalog.adapter(ref("me/long"))
    assert world.hub.count("tuned/3") == 0
    with pytest.raises(BaseNotServed, match="tuned/a"):
        await catalog.adapter(ref("me/circle"))


async def test_an_adapter_of_a_base_that_is_not_served_is_refused_naming_what_is(world: World):
    world.put("me/sketch", adapter_files("other/base"))
    catalog = world.catalog()
    with pytest.raises(BaseNotServed) as refusal:
        await catalog.resolve(None, (ref("me/sketch"),))
    for name in ("me/sketch", "other/base", "demo/sd", "big", "alias"):
        assert name in str(refusal.value)


async def test_an_adapter_of_an_unserved_fine_tune_is_served_on_a_base_that_it_fits_where_the_request_names_it(
    world: World,
):
    world.put("me/sketch", adapter_files("other/base"))
    assert (await world.catalog().resolve("demo/sd", (ref("me/sketch"),))).base.id == "demo/sd"
    with pytest.raises(BaseNotServed):
        await world.catalog().resolve("big", (ref("me/sketch"),))


async def test_an_adapter_of_another_base_than_the_named_one_is_a_bad_request_naming_both(world: World):
    world.put("me/sketch", adapter_files("demo/sd"))
    with pytest.raises(BaseMismatch) as refusal:
        await world.catalog().resolve("big", (ref("me/sketch"),))
    assert refusal.value.status == 400
    for name in ("me/sketch", "demo/sd", "big"):
        assert name in str(refusal.value)


async def test_of_several_bases_in_the_card_the_named_one_serves_else_the_first_that_is_served(world: World):
    config = world.config()
    twin = BaseModelConfig.model_validate({"id": "twin", "source": {"embedded": "demo/sd"}})
    config = config.model_copy(update={"bases": (*config.bases, twin)})
    world.put("me/sketch", adapter_files(["other/base", "small", "twin"]))
    catalog = world.catalog(config)
    assert (await catalog.resolve(None, (ref("me/sketch"),))).base.id == "demo/sd"
    assert (await catalog.resolve("twin", (ref("me/sketch"),))).base.id == "twin"


async def test_without_a_card_several_fitting_bases_leave_the_choice_to_the_request(world: World):
    config = world.config()
    twin = BaseModelConfig.model_validate({"id": "twin", "source": {"folder": world.folder / "demo-root/demo/sd"}})
    config = config.model_copy(update={"bases": (*config.bases, twin)})
    world.put("me/sketch", {WEIGHTS: lora()})
    catalog = world.catalog(config)
    with pytest.raises(BaseNotServed, match="fit demo/sd, twin: name one"):
        await catalog.resolve("me/sketch", ())
    assert (await catalog.resolve("twin", (ref("me/sketch"),))).base.id == "twin"
    with pytest.raises(BaseMismatch):
        await catalog.resolve("big", (ref("me/sketch"),))


async def test_a_header_that_contradicts_the_card_is_refused_naming_both_bases(world: World):
    world.put("me/sketch", adapter_files("demo/sd", SDXL_LORA))
    with pytest.raises(ShapeMismatch) as refusal:
        await world.catalog().resolve("me/sketch", ())
    assert refusal.value.status == 422
    for word in ("me/sketch", "demo/sd", "big", "112", "64"):
        assert word in str(refusal.value)


async def test_the_file_of_another_kind_of_network_matches_no_layer(world: World):
    weights = save(pair("transformer.single_transformer_blocks.0.attn.to_q", 3072))
    world.put("me/sketch", adapter_files("demo/sd", weights))
    with pytest.raises(NoLayerMatches, match="demo/sd has a unet"):
        await world.catalog().adapter(ref("me/sketch"))


# Which file, and is it an adapter at all


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({"README.md": card("demo/sd"), "weights.bin": b"pickle"}, UnsafeFile, "weights.bin"),
        ({"README.md": card("demo/sd")}, NotAnAdapter, "no safetensors"),
        (base_files(64, [32], "StableDiffusionPipeline"), NotAnAdapter, "whole model"),
        ({WEIGHTS: save({"conv_in.weight": np.ones((2, 2), np.float32)})}, NotAnAdapter, "low-rank"),
        ({WEIGHTS: save(pair("base_model.model.model.layers.0.mlp", 64))}, NotAnAdapter, "image model"),
        ({"a.safetensors": lora(), "b.safetensors": lora(rank=8)}, AmbiguousFile, "a.safetensors, b.safetensors"),
        ({WEIGHTS: lora()[:40]}, MalformedFile, "truncated"),
        ({WEIGHTS: b"junk that is not a file"}, MalformedFile, "claims"),
        ({WEIGHTS: lora(rank=1024)}, RankTooHigh, "1024"),
    ],
)
async def test_what_is_no_servable_adapter_is_refused_with_the_reason(
    world: World, files: dict[str, bytes], error: type[LoraplexError], words: str
):
    world.put("me/thing", files)
    with pytest.raises(error, match=words) as refusal:
        await world.catalog().resolve("me/thing", ())
    assert refusal.value.status == 422
    assert str(world.folder) not in str(refusal.value)


async def test_many_candidates_are_listed_without_reading_them_all(world: World):
    world.put("me/thing", {f"{n:02}.safetensors": b"never read" for n in range(12)})
    with pytest.raises(AmbiguousFile, match=r"00\.safetensors.* and 2 more"):
        await world.catalog().adapter(ref("me/thing"))


async def test_the_one_file_with_pairs_is_the_adapter_and_a_named_file_is_taken(world: World):
    other = save({"conv_in.weight": np.ones((2, 2), np.float32)})
    world.put("me/one", {"README.md": card("demo/sd"), "a.safetensors": other, "b.safetensors": lora()})
    world.put("me/two", {"README.md": card("demo/sd"), "a.safetensors": lora(), "b.safetensors": lora(rank=8)})
    catalog = world.catalog()
    assert (await catalog.adapter(ref("me/one"))).filename == "b.safetensors"
    assert (await catalog.adapter(ref("me/two", filename="b.safetensors"))).filename == "b.safetensors"
    with pytest.raises(ModelNotFound, match=r"no file 'c\.safetensors'"):
        await catalog.adapter(ref("me/two", filename="c.safetensors"))


async def test_a_file_over_the_limit_of_its_base_is_too_large(world: World):
    config = world.config()
    limited = config.bases[0].model_copy(
        update={"adapter_limits": config.bases[0].adapter_limits.model_copy(update={"max_file": 100})}
    )
    limited = BaseModelConfig.model_validate(limited.model_dump())
    config = config.model_copy(update={"bases": (limited, *config.bases[1:])})
    world.put("me/sketch", adapter_files("demo/sd"))
    with pytest.raises(TooLarge, match="me/sketch.*100B"):
        await world.catalog(config).adapter(ref("me/sketch"))


async def test_a_base_is_no_adapter(world: World):
    with pytest.raises(NotAnAdapter, match="base model"):
        await world.catalog().resolve("big", (ref("small"),))


async def test_a_base_that_went_is_told_from_what_was_never_known_and_is_not_looked_up(world: World):
    counted: list[None] = []

    @contextlib.asynccontextmanager
    async def counting() -> AsyncGenerator[None]:
        counted.append(None)
        yield

    catalog = world.catalog(was_base=lambda name: name in ("me/gone", "big"), counting_unknown=counting)
    with pytest.raises(BaseRemoved, match="^base me/gone is not served any more; served are demo/sd, big$") as went:
        await catalog.resolve("me/gone", ())
    assert (went.value.status, world.hub.count(), counted) == (404, 0, [])
    assert (await catalog.resolve("big", ())).base.id == "big"
    with pytest.raises(ModelNotFound, match="neither a served base nor an adapter"):
        await catalog.resolve("me/never", ())


# What is known


async def test_known_adapters_are_those_in_folders_and_those_resolved_and_nothing_unservable(world: World):
    world.put("me/b", adapter_files("demo/sd"))
    world.put("me/bad", {"README.md": card("demo/sd"), "x.bin": b""})
    world.put("me/foreign", adapter_files("other/base"))
    world.hub.push("hub/a", adapter_files("big", SDXL_LORA))
    catalog = world.catalog()
    assert [known.spec.id for known in await catalog.known()] == ["me/b"]
    await catalog.adapter(ref("hub/a"))
    assert [(known.spec.id, known.spec.base_id) for known in await catalog.known()] == [
        ("hub/a", "big"),
        ("me/b", "demo/sd"),
    ]


async def test_a_spec_from_a_place_that_a_replica_does_not_have_is_not_found(world: World):
    world.put("me/sketch", adapter_files("demo/sd"))
    spec = await world.catalog().adapter(ref("me/sketch"))
    with pytest.raises(ModelNotFound, match="not configured"):
        await AdapterFiles([]).path(spec)


async def test_a_known_adapter_resolves_at_once_in_a_few_turns_of_the_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    world.put("me/a", adapter_files("demo/sd"))
    world.put("me/b", adapter_files("demo/sd", lora(rank=3)))
    catalog = world.catalog()
    refs = (ref("me/b", scale=0.5),)
    before = await catalog.resolve("me/a", refs)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("left the event loop's thread")

    for module in ("sources.hub", "sources.remote_calls", "reading.bases", "sources.folder"):
        monkeypatch.setattr(f"serve_app.catalog.{module}.run_blocking", forbidden)
    monkeypatch.setattr(threading.Thread, "start", forbidden)
    monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", forbidden)

    # Counted, not timed: these are what takes time, on whatever machine.
    calls: Counter[str] = Counter()
    resolving = asyncio.ensure_future(catalog.resolve("me/a", refs))
    sys.setprofile(lambda _frame, event, _argument: calls.update([event]))
    try:
        for _ in range(MAX_TURNS):
            await asyncio.sleep(0)
    finally:
        sys.setprofile(None)
    assert resolving.done()
    assert resolving.result() == before
    assert calls["call"] < MAX_CALLS


async def test_only_names_that_nothing_is_known_of_are_counted(world: World):
    world.put("me/a", adapter_files("demo/sd"))
    counted: list[str] = []

    @contextlib.asynccontextmanager
    async def counting():
        try:
            yield
        except ModelNotFound as error:
            counted.append(error.model)
            raise

    catalog = world.catalog(counting_unknown=counting)
    for name in ("me/a", "me/nobody", "me/nobody", "../x", "demo/sd", "me/else"):
        with contextlib.suppress(ModelNotFound):
            await catalog.resolve(name, ())
    assert counted == ["me/nobody", "me/else"]
    await catalog.visible(["me/gone"], None)
    with pytest.raises(ModelNotFound):
        await catalog.lookup_adapter(ref("me/listed"), is_listing=True)
    assert counted == ["me/nobody", "me/else"]
