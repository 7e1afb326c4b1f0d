"""A real browser for the page's tests; without one they skip, and say so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext

from serve_app.api.app import create_app
from serve_app.config import IngressSettings
from tests.browser.playground import Playground, chromium, chromium_path
from tests.service import Service
from tests.unit.api.fakes import FakeGateway, served


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    if chromium_path() is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    async with chromium() as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    async with await browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light") as opened:
        await opened.grant_permissions(["clipboard-read", "clipboard-write"])
        yield opened


@pytest_asyncio.fixture(loop_scope="session")
async def playground(context: BrowserContext, service: Service) -> AsyncIterator[Playground]:
    """The page of the real service."""
    opened = await Playground.open(context, service.url)
    yield opened
    opened.check_manners()


@pytest.fixture(scope="session")
def fake_service() -> Iterator[tuple[FakeGateway, str]]:
    gateway = FakeGateway()
    with served(create_app(gateway, IngressSettings())) as url:
        yield gateway, url


@pytest.fixture
def gateway(fake_service: tuple[FakeGateway, str]) -> FakeGateway:
    """What stands behind `staged`: it can be made to wait and to fail."""
    fake_service[0].reset()
    return fake_service[0]


@pytest_asyncio.fixture(loop_scope="session")
async def staged(
    context: BrowserContext, gateway: FakeGateway, fake_service: tuple[FakeGateway, str]
) -> AsyncIterator[Playground]:
    """The page over a gateway that does what a test says."""
    opened = await Playground.open(context, fake_service[1])
    yield opened
    gateway.cancelled.set()
    opened.check_manners()
