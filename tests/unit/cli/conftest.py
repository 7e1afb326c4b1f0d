from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from typer.testing import CliRunner, Result

from serve_app.api.app import create_app
from serve_app.catalog.replica_report import ModelInfo
from serve_app.cli.main import app
from serve_app.config import IngressSettings
from tests.unit.api.fakes import FakeGateway, served

Run = Callable[..., Result]

MODELS = tuple(
    ModelInfo(model, base, "loraplex", 0)
    for model, base in (
        ("demo/sdxl", None),
        ("demo/sd15", None),
        ("demo/sdxl-sepia", "demo/sdxl"),
        ("demo/sdxl-night", "demo/sdxl"),
        ("demo/sd15-night", "demo/sd15"),
    )
)


class Doorkeeper:
    """Notes the Authorization header of every request, then lets it pass."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.shown: list[str | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self.shown.append(headers[b"authorization"].decode() if b"authorization" in headers else None)
        await self._app(scope, receive, send)


@pytest.fixture(scope="session")
def session_gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture(scope="session")
def session_door(session_gateway: FakeGateway) -> Doorkeeper:
    return Doorkeeper(create_app(session_gateway, IngressSettings()))


@pytest.fixture(scope="session")
def session_url(session_door: Doorkeeper) -> Iterator[str]:
    with served(session_door) as url:
        yield url


@pytest.fixture
def gateway(session_gateway: FakeGateway) -> FakeGateway:
    session_gateway.reset()
    session_gateway.known = MODELS
    return session_gateway


@pytest.fixture
def door(session_door: Doorkeeper) -> Doorkeeper:
    session_door.shown.clear()
    return session_door


@pytest.fixture
def url(session_url: str, gateway: FakeGateway) -> str:
    """The address of a real server on loopback, over the gateway."""
    return session_url


@pytest.fixture
def run() -> Run:
    """Run a command line in this process."""

    def run(*arguments: object, **environment: str) -> Result:
        # As in a pipe: no colours, and lines as long as they are.
        env = {"LORAPLEX_URL": None, "LORAPLEX_KEY": None, "TERM": "dumb", "COLUMNS": "200", **environment}
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)

    return run
