"""The page draws with eight families, and shows their previews."""

from __future__ import annotations

import pytest
from playwright.async_api import BrowserContext

from tests.browser.playground import Playground
from tests.family_service import FAMILIES
from tests.service import Service

# Of this test it is also the time in which nine bases start.
pytestmark = [
    pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1200), pytest.mark.asyncio(loop_scope="session")
]  # fmt: skip


async def test_the_page_draws_with_eight_families_and_shows_previews(
    context: BrowserContext, families: Service
) -> None:
    playground = await Playground.open(context, f"{families.url}/")
    for name in FAMILIES:
        await playground.page.select_option("#base", f"tiny/{name}")
        await playground.page.evaluate("""() => {
            window.seen = [];
            const note = () => window.seen.push(document.querySelector(".card img")?.className ?? "");
            new MutationObserver(note).observe(document.getElementById("gallery"), {subtree: true, attributes: true});
        }""")
        await playground.write("a red cat", steps=4)
        await playground.generate()
        assert (await playground.pixels()).shape == (64, 64, 3)
        assert "preview" in await playground.page.evaluate("window.seen"), name
    assert playground.console == []
