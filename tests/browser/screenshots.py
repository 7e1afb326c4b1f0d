"""Pictures of the page for the README and for whoever changes how it looks: `python -m tests.browser.screenshots`.

Starts the embedded models, draws a few images on the page as a person would, and writes docs/playground-WIDTH.png,
the widest one for each theme.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from playwright.async_api import Browser, expect

from tests.browser.playground import Playground, chromium
from tests.service import BASES, Service, base_settings, ray_cluster

DOCS = Path(__file__).parents[2] / "docs"
VIEWS = (
    ("playground-1440", 1440, 900, "light"),
    ("playground-1440-dark", 1440, 900, "dark"),
    ("playground-768", 768, 1024, "light"),
    ("playground-360", 360, 740, "dark"),
)


async def photograph(browser: Browser, url: str, folder: Path) -> None:
    for name, width, height, theme in VIEWS:
        size = {"width": width, "height": height}
        async with await browser.new_context(viewport=size, color_scheme=theme) as context:  # type: ignore[arg-type]
            shown = await Playground.open(context, url, draws_pictures=True)
            await compose(shown)
            if width < 700:
                # The whole page in one view: what sticks to an edge is then where it belongs.
                await shown.page.set_viewport_size({"width": width, "height": await shown.height()})
            await shown.page.screenshot(path=folder / f"{name}.png")


async def compose(shown: Playground) -> None:
    """Draw one image with one adapter, then four with two adapters."""
    await shown.page.get_by_role("button", name="Stripes").click()
    await shown.page.fill("#seed", "7")
    await shown.generate()
    await shown.page.get_by_role("button", name="Two at once").click()
    await shown.page.fill("#count", "4")
    await shown.generate()
    await expect(shown.element(".chip.applied", has_text="sdxl-sepia")).not_to_have_count(0)
    await expect(shown.element(".replica.busy")).to_have_count(0)
    await shown.page.mouse.move(0, 0)
    await shown.page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running service; without it one is started")
    parser.add_argument("--folder", type=Path, default=DOCS)
    options = parser.parse_args()
    if options.url:
        asyncio.run(draw(options.url, options.folder))
        return
    with tempfile.TemporaryDirectory() as home, ray_cluster(Path(home)) as port:
        start(Path(home))
        asyncio.run(draw(f"http://127.0.0.1:{port}", options.folder))


def start(home: Path) -> None:

    from cluster.local_service import run_service

    fields = {
        "bases": [base_settings(base_id, autoscaling={"min_replicas": 2, "max_replicas": 2}) for base_id in BASES],
        "adapters": {"embedded": True, "hub": {"enabled": False}},
        "ingress": {"replicas": 1, "num_cpus": 0.1},
        "cache_dir": str(home / "cache"),
    }
    run_service(fields)


async def draw(url: str, folder: Path) -> None:
    # The first request of each adapter also fetches it, and its card has it drawn: the pictures are to show neither.
    post = Service(url).http.post
    for base, styles in (
        ("sdxl", ("stripes", "inverted", "night", "sepia", "sketch")),
        ("sd15", ("inverted", "sketch")),
    ):
        await asyncio.gather(*(asyncio.to_thread(post, f"/v1/pictures/demo/{base}-{style}") for style in styles))
    async with chromium() as browser:
        await photograph(browser, url, folder)


if __name__ == "__main__":
    main()
