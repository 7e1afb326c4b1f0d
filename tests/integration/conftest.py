"""What several of the integration tests start with."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from tests.replicas.controlled import BASE, Device, controlled_service
from tests.service import Service


@pytest.fixture
def app(cluster: int) -> Iterator[str]:
    """A name of its own: Serve keeps handles by name, and one made before may take a while to see new replicas."""
    name = f"sleeping-{secrets.token_hex(4)}"
    yield name
    serve.delete(name)


@pytest.fixture
def device(service: Service, service_cache: Path) -> Device:
    """The device of the service's `BASE`, with nothing to do."""
    device = Device(BASE, "loraplex", service_cache)
    device.wait_until_idle()
    return device


@pytest.fixture(scope="session")
def controlled(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Device]]:
    """A service of its own that takes few requests, may lose its replicas and has a base that starts when it is asked
    for; and the device of its `BASE`."""
    with controlled_service(cluster, tmp_path_factory.mktemp("cache")) as running:
        yield running
