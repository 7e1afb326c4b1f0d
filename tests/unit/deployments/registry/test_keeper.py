"""The keeper itself, outside of Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.catalog.resolving.aliases import NOTHING_YET, Alias
from serve_app.config import Environment, SharedSettings
from serve_app.core import AdapterRef
from serve_app.deployments.registry.keeper import Keeper
from serve_app.settings import RegistrySettings
from tests.redis_server import Redis, needs_redis


def keeper(head: Path, **registry: str) -> Any:
    settings = RegistrySettings.model_validate(registry)
    return Keeper.func_or_class(SharedSettings(), settings, Environment(cache_dir=head))  # type: ignore[operator]


@needs_redis
async def test_aliases_in_redis_are_there_on_another_head_with_another_disk(tmp_path: Path) -> None:
    redis = Redis()
    try:
        before = await keeper(tmp_path / "lost", redis=redis.url).put(
            Alias("mine", AdapterRef("a/b")), may_replace=False
        )
        assert await keeper(tmp_path / "new", redis=redis.url).watch(NOTHING_YET, {}) == before
    finally:
        redis.stop()
