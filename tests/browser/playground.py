"""The page as a person uses it, for tests and for pictures of it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Route, async_playwright, expect

# How long anything may take on a machine that is busy with other things; what is there already is not waited for.
PATIENCE_MS = 90_000
AUDIT = (Path(__file__).parent / "audit.js").read_text()
# Chromium tells of every reply over 399; the page's own words are what is looked at.
EXPECTED_CONSOLE = ("Failed to load resource: the server responded with a status of",)
PIXELS = """image => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [canvas.height, canvas.width, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""


async def _refuse_to_draw(route: Route) -> None:
    await (route.fulfill(status=404) if route.request.method == "POST" else route.continue_())


def chromium_path() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    async with async_playwright() as driver:
        # CI runs as root, where Chromium's own sandbox cannot start.
        browser = await driver.chromium.launch(
            executable_path=chromium_path(), args=["--no-sandbox"], timeout=PATIENCE_MS
        )
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Playground:
    page: Page
    url: str
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    @classmethod
    async def open(cls, context: BrowserContext, url: str, *, draws_pictures: bool = False) -> Playground:
        """Open the page; pictures of adapters that have none would be drawn between what a test draws."""
        opened = cls(await context.new_page(), url)
        if not draws_pictures:
            await opened.page.route("**/v1/pictures/**", _refuse_to_draw)
        opened.page.set_default_timeout(PATIENCE_MS)
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("console", opened._hear)
        opened.page.on("pageerror", lambda error: opened.console.append(str(error)))
        await opened.page.goto(url)
        # The summary is there once the catalog is; on a phone it is hidden.
        await opened.page.locator("#summary:not(:empty), #key-form:not([hidden])").first.wait_for(state="attached")
        return opened

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(EXPECTED_CONSOLE):
            self.console.append(message.text)

    def check_manners(self) -> None:
        """No word of the browser's: no script failed, nothing offended the page's policy; and nothing came from
        elsewhere."""
        assert self.console == []
        outside = [url for url in self.requests if not url.startswith((f"{self.url}/", f"blob:{self.url}/"))]
        assert outside == []

    def element(self, selector: str, *, has_text: str | None = None) -> Locator:
        return self.page.locator(selector, has_text=has_text)

    @property
    def card(self) -> Locator:
        """The newest request's card."""
        return self.page.locator("article.card").first

    async def write(self, prompt: str, **numbers: Any) -> None:
        await self.page.fill("#prompt", prompt)
        for name, value in numbers.items():
            await self.page.fill(f"#{name}", str(value))

    async def generate(self) -> None:
        """Press the button, and wait for the images."""
        count = await self.page.locator("article.card").count()
        await self.page.click("#generate")
        await self.page.locator("article.card:not(.running)").nth(count).wait_for()

    async def choose(self, adapter: str) -> None:
        await self.page.fill("#adapter", adapter)
        await self.page.locator(f"[role=option][data-id='{adapter}']").click()

    async def copy(self, label: str) -> str:
        """Press a button of the newest card that copies, and return what is then in the clipboard."""
        status = self.page.locator("#status")
        await status.evaluate("status => { status.textContent = ''; }")
        await self.card.get_by_role("button", name=label).click()
        # Said once the clipboard has it, and for longer than the button says so.
        await expect(status).to_have_text("Copied")
        copied: str = await self.page.evaluate("navigator.clipboard.readText()")
        return copied

    async def pixels(self, image: Locator | None = None) -> NDArray[np.uint8]:
        """Return an image as the page shows it; the newest card's first where none is named."""
        found = image or self.card.locator("img.done").first
        height, width, values = await found.evaluate(PIXELS)
        return np.array(values, dtype=np.uint8).reshape(height, width, 4)[..., :3]

    async def audit(self, name: str) -> Any:
        """Return what a function of `audit.js` finds."""
        return await self.page.evaluate(f"() => {{ {AUDIT}; return {name}(); }}")

    async def has_sideways_scroll(self) -> bool:
        found: bool = await self.page.evaluate("document.documentElement.scrollWidth > innerWidth")
        return found

    async def height(self) -> int:
        found: int = await self.page.evaluate("document.documentElement.scrollHeight")
        return found
