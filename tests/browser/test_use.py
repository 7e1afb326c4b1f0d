"""How the page is used without a mouse, on a phone, in the dark; and what it tells while it waits."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from tests.browser.playground import Playground
from tests.service import Service
from tests.unit.api.fakes import FakeGateway

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
    await keyboard.press("Enter")
    assert await playground.element("#adapters .model").all_inner_texts() == ["demo/sdxl-sepia"]
    await keyboard.press("Control+Enter")
    await playground.element("article.card:not(.running)").wait_for()
    await keyboard.press("ArrowDown")
    await keyboard.press("Escape")
    await expect(playground.element("#adapter-list")).to_be_hidden()


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
    await expect(staged.element("#generate")).to_be_visible()
    assert gateway.cancelled.wait(20)


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


@pytest_asyncio.fixture(params=["light", "dark"], loop_scope="session")
async def themed(request: pytest.FixtureRequest, browser: Browser, service: Service) -> AsyncIterator[Playground]:
    size = {"width": 360, "height": 740}
    async with await browser.new_context(viewport=size, color_scheme=request.param) as context:  # type: ignore[arg-type]
        opened = await Playground.open(context, service.url)
        yield opened
        opened.check_manners()


async def test_a_phone_shows_everything_without_scrolling_sideways_and_at_good_contrast(themed: Playground) -> None:
    found: dict[str, tuple[bool, list[str], list[str]]] = {}

    async def look(state: str) -> None:
        faint = await themed.audit("faintText"), await themed.audit("faintFields")
        found[state] = (await themed.has_sideways_scroll(), *faint)

    await look("empty")
    await themed.page.get_by_role("button", name="Two at once").click()
    await themed.page.fill("#count", "2")
    await themed.generate()
    await expect(themed.element(".chip.applied").first).to_be_visible()
    await look("done")
    await themed.page.fill("#steps", "99")
    await themed.page.click("#generate")
    await themed.element(".field-error").wait_for()
    await themed.page.focus("#adapter")
    await themed.element("[role=option]").first.wait_for()
    await look("wrong")
    await themed.page.click("#theme")
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
