"""How the page is used without a mouse, on a phone, in the dark; and what it tells while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Route, expect

from serve_app.api.pictures.images import encode_image
from tests.browser.playground import Playground
from tests.service import Service
from tests.unit.api.fake_registry import known
from tests.unit.api.fakes import FakeGateway, gradient

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_everything_is_done_from_the_keyboard(playground: Playground) -> None:
    keyboard = playground.page.keyboard
    await keyboard.press("Tab")
    await keyboard.press("Enter")  # skip to the prompt
    await expect(playground.element("#prompt")).to_be_focused()
    await keyboard.type("a large yellow star on a blue background")
    for _ in range(20):
        if await playground.page.evaluate("document.activeElement.id") == "adapter":
            break
        await keyboard.press("Tab")
    await keyboard.type("sepia")
    await expect(playground.element("#adapter")).to_have_attribute("aria-expanded", "true")
    # Other tests leave adapters behind of which one may come first.
    for _ in range(20):
        if await playground.element("[role=option][aria-selected=true]").get_attribute("data-id") == "demo/sdxl-sepia":
            break
        await keyboard.press("ArrowDown")
    await keyboard.press("Enter")
    assert await playground.element("#adapters .model").all_inner_texts() == ["demo/sdxl-sepia"]
    await keyboard.press("Control+Enter")
    await playground.element("article.card:not(.running)").wait_for()
    await keyboard.press("ArrowDown")
    await keyboard.press("Escape")
    await expect(playground.element("#adapter-list")).to_be_hidden()


@asynccontextmanager
async def held_answers(page: Page) -> AsyncIterator[Callable[[], Awaitable[Route]]]:
    """Keep back what the page asks about the adapters; what is yielded waits for the next question."""
    questions: asyncio.Queue[Route] = asyncio.Queue()
    await page.route("**/v1/loras", questions.put)
    yield questions.get
    await page.unroute("**/v1/loras")


async def test_an_answer_that_comes_while_one_chooses_moves_nothing(staged: Playground, gateway: FakeGateway) -> None:
    option = staged.element("[role=option][data-id='demo/sketch']")
    async with held_answers(staged.page) as next_question:
        await staged.page.focus("#adapter")
        question = await next_question()
        await staged.page.keyboard.type("sketch")
        before = await option.bounding_box()
        # It sorts before the one that is chosen.
        gateway.registry.rows["acme/sketch"] = known("acme/sketch")
        await question.continue_()
        await expect(staged.element("[role=option][data-id='acme/sketch']")).to_be_visible()
    assert await option.bounding_box() == before
    await expect(option).to_have_attribute("aria-selected", "true")
    await expect(staged.element("#adapter")).to_have_attribute(
        "aria-activedescendant", await option.get_attribute("id") or ""
    )
    await staged.page.keyboard.press("Enter")
    assert await staged.element("#adapters .model").all_inner_texts() == ["demo/sketch"]
    await staged.page.keyboard.type("sketch")
    assert await staged.element("[role=option]").first.get_attribute("data-id") == "acme/sketch"


async def test_an_answer_that_was_overtaken_is_not_shown(staged: Playground, gateway: FakeGateway) -> None:
    async with held_answers(staged.page) as next_question:
        await staged.page.focus("#adapter")
        earlier = await next_question()
        old = await earlier.fetch()
        await staged.page.focus("#prompt")
        await staged.page.focus("#adapter")
        gateway.registry.rows["acme/sketch"] = known("acme/sketch")
        await (await next_question()).continue_()
        await expect(staged.element("[role=option][data-id='acme/sketch']")).to_be_visible()
        async with staged.page.expect_event("requestfinished", lambda asked: asked == earlier.request):
            await earlier.fulfill(response=old)
        # Once another answer has been read, so has this one.
        await staged.page.evaluate("fetch('v1/bases').then(reply => reply.json())")
    await staged.page.keyboard.type("sketch")
    await expect(staged.element("[role=option][data-id='acme/sketch']")).to_be_visible()


async def test_every_stop_of_the_tab_key_can_be_seen_and_has_a_name(staged: Playground, gateway: FakeGateway) -> None:
    await staged.write("a star")
    await staged.choose("demo/sketch")
    await staged.generate()
    await staged.page.evaluate("document.querySelector('.skip').focus()")
    stops = []
    for _ in range(60):
        await staged.page.keyboard.press("Tab")
        if await staged.page.evaluate("document.activeElement === document.body"):
            break
        stops.append(await staged.audit("focusRing"))
    assert len(stops) > 20
    assert [stop["name"] for stop in stops if not stop["isSeen"]] == []
    assert await staged.audit("nameless") == []


async def test_a_mask_is_painted_with_the_keys_and_taken_back(staged: Playground, gateway: FakeGateway) -> None:
    report = gateway.registry.reports[0]
    assert report.abilities is not None
    abilities = replace(report.abilities, parameters={"text": (), "image": (), "inpaint": ()})
    gateway.registry.reports = (replace(report, abilities=abilities),)
    await staged.page.reload()
    await staged.element("#summary:not(:empty)").wait_for()
    picture = encode_image(gradient(60, 40), "png")
    await staged.element("#picture").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture})
    await staged.page.click("#mask-open")
    await staged.page.focus("#mask-canvas")
    keyboard = staged.page.keyboard
    for key in ("ArrowRight", "Space", "Shift+ArrowDown", "Control+z"):
        await keyboard.press(key)
    await expect(staged.element("#mask-undo")).to_be_enabled()
    for check in ("faintText", "faintFields", "nameless"):
        assert await staged.audit(check) == []
    await staged.page.set_viewport_size({"width": 360, "height": 740})
    assert not await staged.has_sideways_scroll()
    await keyboard.press("Control+Enter")
    await staged.element("article.card:not(.running)").wait_for()
    mask = gateway.draft.mask
    assert mask is not None
    assert (mask.width, mask.height) == (60, 40)
    rows = np.frombuffer(mask.values, np.uint8).reshape(40, 60)
    # A dot of 12% of the width, one step right of the middle.
    assert rows[20, 31] == 255
    assert 30 < (rows > 127).sum() < 60
    await keyboard.press("Control+z")
    for name in ("undo", "clear", "save"):
        await expect(staged.element(f"#mask-{name}")).to_be_disabled()
    await staged.generate()
    assert gateway.drafts[-1].mask is None


async def test_waiting_is_told_and_escape_gives_the_place_back(staged: Playground, gateway: FakeGateway) -> None:
    await staged.page.evaluate("""() => {
        window.said = [];
        const status = document.getElementById("status");
        new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true});
    }""")
    gateway.is_begun = gateway.is_stuck = True
    await staged.write("a star")
    await staged.page.keyboard.press("Control+Enter")
    await expect(staged.element("#status")).to_have_text("Step 1 of 4")
    assert "Waiting, 2 requests ahead" in await staged.page.evaluate("window.said")
    assert await staged.element("#status").get_attribute("aria-live") == "polite"
    await staged.page.keyboard.press("Escape")
    await expect(staged.element("#cancel")).to_be_hidden()
    assert gateway.cancelled.wait(120)


async def test_a_button_that_copies_says_what_it_does_again(staged: Playground, gateway: FakeGateway) -> None:
    await staged.write("a star")
    await staged.generate()
    # Time stands still, as it says "Copied" for a moment only.
    await staged.page.clock.install(time=0)
    await staged.page.clock.pause_at(3600)
    button = staged.card.locator(".buttons button").first
    await staged.copy("Copy as curl")
    await expect(button).to_have_text("Copied")
    await staged.copy("Copied")
    await staged.page.clock.run_for(5000)
    await expect(button).to_have_text("Copy as curl")


async def test_a_page_that_nobody_sees_asks_nothing(staged: Playground, gateway: FakeGateway) -> None:
    def polls() -> int:
        return sum(url.endswith("/v1/replicas") for url in staged.requests)

    async def look(*, is_hidden: bool) -> None:
        await staged.page.evaluate(
            """isHidden => {
                Object.defineProperty(document, "hidden", {value: isHidden, configurable: true});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            is_hidden,
        )

    await staged.page.clock.install()
    await staged.page.reload()
    await expect(staged.element(".replica")).to_have_count(1)
    async with staged.page.expect_response("**/v1/replicas"):
        await staged.page.clock.run_for(2100)
    await look(is_hidden=True)
    before = polls()
    await staged.page.clock.run_for(60_000)
    assert polls() == before
    async with staged.page.expect_response("**/v1/replicas"):
        await look(is_hidden=False)


@pytest_asyncio.fixture(loop_scope="session")
async def phone(browser: Browser, service: Service) -> AsyncIterator[Playground]:
    size = {"width": 360, "height": 740}
    async with await browser.new_context(viewport=size, color_scheme="light") as context:
        opened = await Playground.open(context, service.url)
        yield opened
        opened.check_manners()


async def test_a_phone_shows_everything_without_scrolling_sideways_and_at_good_contrast(phone: Playground) -> None:
    found: dict[str, tuple[bool, list[str], list[str]]] = {}

    async def look(state: str) -> None:
        faint = await phone.audit("faintText"), await phone.audit("faintFields")
        found[state] = (await phone.has_sideways_scroll(), *faint)

    await look("empty")
    await phone.page.get_by_role("button", name="Two at once").click()
    await phone.page.fill("#count", "2")
    await phone.generate()
    await expect(phone.element(".chip.applied").first).to_be_visible()
    await look("done")
    await phone.page.fill("#steps", "99")
    await phone.page.click("#generate")
    await phone.element(".field-error").wait_for()
    await phone.page.focus("#adapter")
    await phone.element("[role=option]").first.wait_for()
    await look("wrong")
    await phone.page.click("#theme")
    await look("other colours")
    assert found == dict.fromkeys(("empty", "done", "wrong", "other colours"), (False, [], []))


async def test_the_dark_follows_the_system_and_the_button_beats_it(browser: Browser, service: Service) -> None:
    async with await browser.new_context(color_scheme="dark") as context:
        page = (await Playground.open(context, service.url)).page
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = await page.evaluate(ground)
        assert sum(int(part) for part in dark[4:-1].split(",")) < 100
        await page.click("#theme")
        await page.reload()
        light = await page.evaluate(ground)
        assert sum(int(part) for part in light[4:-1].split(",")) > 700
