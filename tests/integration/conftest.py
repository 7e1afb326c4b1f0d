"""What several of the integration tests start with."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from ray import serve

from tests.replicas.controlled import Device, controlled_service
from tests.service import Service


@pytest.fixture
def app(cluster: int) -> Iterator[str]:
    """A name of its own: Serve keeps handles by name, and one made before may take a while to see new replicas."""
    name = f"sleeping-{secrets.token_hex(4)}"
    yield name
    serve.delete(name)


@pytest.fixture(scope="session")
def controlled(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Device]]:
    """A service whose one replica does what a test says, and that replica's device."""
    with controlled_service(cluster, tmp_path_factory.mktemp("cache")) as running:
        yield running
