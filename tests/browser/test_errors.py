from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, expect

from serve_app.api.app import create_app
from serve_app.api.http.auth import Access
from serve_app.config import ApiKey, IngressSettings, digest_of
from serve_app.errors import QueueFull
from tests.browser.playground import Playground
from tests.unit.api.fakes import FakeGateway, served

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_what_is_out_of_bounds_is_told_beside_its_field_until_it_is_changed(playground: Playground) -> None:
    await playground.write("a star", steps=99)
    await playground.page.click("#generate")
    field = playground.element(".field[data-param=num_inference_steps]")
    await expect(field.locator(".field-error")).to_contain_text("Steps is 99")
    await expect(field.locator(".field-error")).to_contain_text("50")
    await expect(playground.element("#steps")).to_be_focused()
    await expect(playground.element("#steps")).to_have_attribute("aria-invalid", "true")
    await expect(playground.element("article.card")).to_have_count(0)
    await playground.page.fill("#steps", "4")
    await expect(field.locator(".field-error")).to_have_count(0)
    await playground.generate()


async def test_an_adapter_that_nobody_knows_is_named_beside_the_adapters(playground: Playground) -> None:
    await playground.write("a star")
    await playground.choose("nobody/nothing")
    await playground.page.click("#generate")
    error = playground.element(".field[data-param=loras] .field-error")
    await expect(error).to_contain_text("nobody/nothing")
    await expect(playground.element(".adapter.blamed")).to_have_attribute("data-id", "nobody/nothing")


async def test_an_empty_prompt_and_a_worded_seed_never_leave_the_page(staged: Playground, gateway: FakeGateway) -> None:
    await staged.page.click("#generate")
    await expect(staged.element(".field[data-param=prompt] .field-error")).to_contain_text("Say what to draw")
    await staged.write("a star", seed="seven")
    await staged.page.click("#generate")
    await expect(staged.element(".field[data-param=seed] .field-error")).to_contain_text("whole number")
    assert gateway.drafts == []


async def test_a_failure_of_the_service_is_told_where_the_images_would_be(
    staged: Playground, gateway: FakeGateway
) -> None:
    await staged.write("a star")
    for count, is_begun in enumerate((False, True), 1):
        gateway.is_begun, gateway.failure = is_begun, QueueFull("demo/sdxl", 64, retry_after_s=3)
        await staged.page.click("#generate")
        await expect(staged.element("article.card.failed [role=alert]")).to_contain_text("demo/sdxl")
        assert await staged.audit("faintText") == []
        gateway.failure = None
        await staged.generate()
        await staged.page.get_by_role("button", name="Remove", exact=True).click()
        await expect(staged.element("article.card")).to_have_count(count)


async def test_several_are_drawn_at_a_time_each_with_its_own_progress_end_and_error(
    staged: Playground, gateway: FakeGateway
) -> None:
    gateway.is_begun = gateway.is_stuck = True
    for count, prompt in enumerate(("one", "two", "three", "four"), 1):
        await staged.write(prompt)
        await staged.page.click("#generate")
        await expect(staged.element(".card.running .said", has_text="Step 1 of 4")).to_have_count(count)
    await staged.page.click("#generate")
    await expect(staged.element("#status")).to_have_text("4 drawings under way: wait for one, or cancel it")
    assert [draft.prompt for draft in gateway.drafts] == ["one", "two", "three", "four"]
    await staged.element(".card", has_text="two").get_by_role("button", name="Cancel").click()
    await expect(staged.element("#cancel")).to_contain_text("Cancel newest")
    await staged.page.keyboard.press("Escape")
    await expect(staged.element(".card .prompt")).to_have_text(["three", "one"])
    gateway.is_stuck, gateway.failure = False, QueueFull("demo/sdxl", 64, retry_after_s=3)
    await staged.write("five")
    await staged.page.click("#generate")
    await expect(staged.element(".card.failed")).to_contain_text("five")
    await expect(staged.element(".card.running")).to_have_count(2)
    gateway.failure = None
    gateway.release()
    await expect(staged.element(".card img.done")).to_have_count(2)
    await expect(staged.element("#cancel")).to_be_hidden()


async def test_a_file_that_is_no_picture_is_refused_on_the_page(staged: Playground, gateway: FakeGateway) -> None:
    await staged.element("#picture").set_input_files(
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    )
    await expect(staged.element(".field[data-param=image] .field-error")).to_contain_text("notes.txt is not a picture")


@pytest.fixture(scope="module")
def locked_url() -> Iterator[str]:
    key = ApiKey(name="team", sha256=digest_of("open-sesame"))
    with served(create_app(FakeGateway(), IngressSettings(), access=Access(keys=lambda: (key,)))) as url:
        yield url


@pytest_asyncio.fixture(loop_scope="session")
async def locked(context: BrowserContext, locked_url: str) -> AsyncIterator[Playground]:
    opened = await Playground.open(context, locked_url)
    yield opened
    opened.check_manners()


async def test_a_service_with_keys_asks_for_one_and_keeps_it_in_the_tab(locked: Playground) -> None:
    form = locked.element("#key-form")
    await expect(form).to_be_visible()
    await locked.page.fill("#key", "wrong")
    await locked.page.keyboard.press("Enter")
    await expect(form).to_contain_text("not accepted")
    await locked.page.fill("#key", "open-sesame")
    await locked.page.keyboard.press("Enter")
    await expect(form).to_be_hidden()
    await locked.write("a star")
    await locked.generate()
    assert await locked.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    copied = await locked.copy("Copy as curl")
    assert "$LORAPLEX_KEY" in copied
    assert "sesame" not in copied
