"""What several of the integration tests start with."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from ray import serve


@pytest.fixture
def app(cluster: int) -> Iterator[str]:
    """A name of its own: Serve keeps handles by name, and one made before may take a while to see new replicas."""
    name = f"sleeping-{secrets.token_hex(4)}"
    yield name
    serve.delete(name)
