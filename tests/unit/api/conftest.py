from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from serve_app.api.app import create_app
from serve_app.config import IngressSettings
from tests.unit.api.fakes import FakeGateway, served


@pytest.fixture(scope="session")
def session_gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def gateway(session_gateway: FakeGateway) -> FakeGateway:
    session_gateway.reset()
    return session_gateway


@pytest.fixture(scope="session")
def session_client(session_gateway: FakeGateway) -> Iterator[TestClient]:
    with TestClient(create_app(session_gateway, IngressSettings(), new_request_id=lambda: "made-id")) as client:
        yield client


@pytest.fixture
def client(session_client: TestClient, gateway: FakeGateway) -> TestClient:
    """A client in this process, over the gateway."""
    return session_client


@pytest.fixture(scope="session")
def session_url(session_gateway: FakeGateway) -> Iterator[str]:
    with served(create_app(session_gateway, IngressSettings())) as url:
        yield url


@pytest.fixture
def url(session_url: str, gateway: FakeGateway) -> str:
    """The address of a real server on loopback, over the gateway."""
    return session_url
