"""The Hub's own client, pointed at a Hub of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub_server import HubServer


def point_hub_client(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Path) -> None:
    """Have the client call a Hub and use a cache, as if it had been imported with both in its environment."""
    for name, value in (
        ("constants.ENDPOINT", hub.endpoint),
        ("constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("constants.HF_HUB_CACHE", str(cache)),
        ("hf_api.api.endpoint", hub.endpoint),
    ):
        monkeypatch.setattr(f"huggingface_hub.{name}", value)
