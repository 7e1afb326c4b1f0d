"""Adapters are chosen from cards: their pictures, the search, the filter by base, and what a choice fills in."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from playwright.async_api import BrowserContext, expect

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.api.pictures.images import encode_image
from serve_app.core import PixelImage
from serve_app.settings import ModelSource
from tests.browser.playground import Playground
from tests.unit.api.fake_registry import BASE, known
from tests.unit.api.fakes import FakeGateway

pytestmark = pytest.mark.asyncio(loop_scope="session")
OTHER = BASE.model_copy(update={"id": "demo/other", "aliases": (), "source": ModelSource(embedded="demo/sd15")})


def put(gateway: FakeGateway, model: str, *, base: str = "demo/sdxl", has_picture: bool = False) -> None:
    """Make an adapter known."""
    row = known(model)
    adapter = replace(row.adapter, spec=replace(row.adapter.spec, base_id=base), has_picture=has_picture)
    gateway.registry.rows[model] = replace(row, adapter=adapter)
    if has_picture:
        red = PixelImage(20, 20, bytes((255, 0, 0)) * 400)
        gateway.registry.pictures[model] = encode_image(red, "png")


async def names(playground: Playground) -> list[str]:
    """What the cards in the list are called."""
    await playground.page.focus("#adapter")
    return await playground.element("[role=option] .model").all_inner_texts()


async def test_a_card_shows_the_picture_that_comes_with_its_adapter(staged: Playground, gateway: FakeGateway) -> None:
    put(gateway, "a 100%/red? #1", has_picture=True)
    await staged.page.focus("#adapter")
    card = staged.element("[role=option][data-id='a 100%/red? #1']")
    await card.locator("img").wait_for()
    assert (await staged.pixels(card.locator("img")))[10, 10].tolist()[0] > 240
    await card.click()
    await staged.element("#adapters img").wait_for()
    asked = [url for url in staged.requests if "/v1/pictures/" in url and "red" in url]
    assert len(asked) == 1, "it is fetched once"
    await expect(staged.element("#adapter-list")).to_be_hidden()


async def test_what_has_no_picture_is_drawn_one_by_one_while_the_list_is_open(
    context: BrowserContext, gateway: FakeGateway, fake_service: tuple[FakeGateway, str]
) -> None:
    put(gateway, "demo/second")
    gateway.is_stuck = True
    shown = await Playground.open(context, fake_service[1], draws_pictures=True)
    async with shown.page.expect_response("**/v1/pictures/**"):
        await shown.page.focus("#adapter")
        await asyncio.to_thread(gateway.started.wait, 60)
        await shown.page.focus("#prompt")
        gateway.release()
    await shown.page.evaluate("fetch('v1/bases').then(reply => reply.json())")
    assert [draft.model for draft in gateway.drafts] == ["demo/second"]
    await shown.page.focus("#adapter")
    await expect(shown.element("[role=option] img")).to_have_count(2)
    assert [draft.model for draft in gateway.drafts] == ["demo/second", "demo/sketch"]
    assert set(gateway.registry.kept) == {"demo/second", "demo/sketch"}
    shown.check_manners()


async def test_cards_are_found_by_words_and_by_base_and_take_their_base_along(
    staged: Playground, gateway: FakeGateway
) -> None:
    gateway.registry.served = (BASE, OTHER)
    put(gateway, "demo/ink")
    put(gateway, "other/ink", base="demo/other")
    await staged.page.reload()
    await expect(staged.element("#adapter-base")).to_have_value("demo/sdxl")
    assert await names(staged) == ["demo/ink", "demo/sketch"]
    await staged.page.select_option("#adapter-base", "")
    assert await names(staged) == ["demo/ink", "demo/sketch", "other/ink"]
    await staged.page.keyboard.type("INK oth")
    assert await names(staged) == ["other/ink", "Use “INK oth”"]
    await expect(staged.element("[role=option]").first).to_contain_text("for demo/other")
    await staged.page.keyboard.press("Enter")
    await expect(staged.element("#base")).to_have_value("demo/other")
    await expect(staged.element("#adapter-base")).to_have_value("demo/other")
    assert await staged.element("#adapters .model").all_inner_texts() == ["other/ink"]


async def test_a_chosen_adapters_settings_fill_the_form_until_it_is_removed(
    staged: Playground, gateway: FakeGateway
) -> None:
    row = gateway.registry.rows["demo/sketch"]
    defaults = AdapterDefaults(steps=4, guidance_scale=0.0, scheduler="LCM")
    spec = replace(row.adapter.spec, defaults=defaults)
    gateway.registry.rows["demo/sketch"] = replace(row, adapter=replace(row.adapter, spec=spec))
    await staged.page.reload()

    async def shown() -> list[str]:
        fields = [staged.element(f"#{name}") for name in ("steps", "guidance")]
        values = [await one.input_value() or await one.get_attribute("placeholder") or "" for one in fields]
        return [*values, await staged.element("#scheduler option").first.text_content() or ""]

    await expect(staged.element("#steps")).to_have_value("30")
    assert await shown() == ["30", "7.5", "default"]
    await staged.choose("demo/sketch")
    assert await shown() == ["4", "0", "default: LCM"]
    await expect(staged.element("#adapters .adapter")).to_contain_text("Sets 4 steps, guidance 0, scheduler LCM")
    await staged.write("a star")
    await staged.generate()
    draft = gateway.draft
    # The service fills in what the adapter sets: the page says nothing of its own.
    assert (draft.steps, draft.guidance_scale, draft.scheduler) == (None, None, None)
    await staged.page.fill("#steps", "6")
    await staged.generate()
    assert gateway.drafts[-1].steps == 6
    await staged.page.get_by_role("button", name="Remove demo/sketch").click()
    assert await shown() == ["6", "7.5", "default"]
