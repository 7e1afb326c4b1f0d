from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from tests.unit.catalog.builders import World


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, hub: HubServer) -> World:
    return World(tmp_path, hub)
