"""Two ingress replicas that count in one real Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve_app.config import AuthSettings, KeyLimits
from serve_app.deployments.ingress.redis_limits import RedisRateLimiter
from serve_app.errors import KeyLimitReached, OutOfBounds
from tests.redis_server import Redis, needs_redis

pytestmark = needs_redis


@pytest.fixture
def redis() -> Iterator[Redis]:
    server = Redis()
    yield server
    server.stop()


async def let_in(limiter: RedisRateLimiter, key: str, limits: KeyLimits) -> bool:
    try:
        grant = await limiter.begin(key, limits)
    except KeyLimitReached:
        return False
    grant.end(drew=True)
    return True


async def test_requests_are_counted_over_all_ingress_replicas(redis: Redis) -> None:
    limits = KeyLimits(requests_per_s=0.01, burst=4)
    replicas = [RedisRateLimiter(redis.url, share=0.5) for _ in range(2)]
    assert [await let_in(replicas[turn % 2], "alice", limits) for turn in range(6)] == [True] * 4 + [False] * 2
    assert await let_in(replicas[0], "bob", limits)
    with pytest.raises(KeyLimitReached) as refused:
        await replicas[1].begin("alice", limits)
    assert 300 < refused.value.retry_after_s <= 400


async def test_images_are_counted_over_all_ingress_replicas(redis: Redis) -> None:
    limits = KeyLimits(images_per_minute=10)
    grants = [await RedisRateLimiter(redis.url, share=0.5).begin("alice", limits) for _ in range(2)]
    await grants[0].spend_images(6)
    with pytest.raises(KeyLimitReached, match="10 images per minute"):
        await grants[1].spend_images(5)
    await grants[1].spend_images(4)
    with pytest.raises(OutOfBounds):
        await grants[0].spend_images(11)


async def test_requests_at_once_are_a_share_of_each_replica(redis: Redis) -> None:
    limits = KeyLimits(concurrency=4)
    limiter = RedisRateLimiter(redis.url, share=0.5)
    grants = [await limiter.begin("alice", limits) for _ in range(2)]
    assert not await let_in(limiter, "alice", limits)
    grants[0].end(drew=False)
    assert await let_in(limiter, "alice", limits)


async def test_while_redis_is_away_shares_hold_and_the_log_says_so_once(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    limits = KeyLimits(requests_per_s=0.01, burst=4, images_per_minute=10)
    limiter = RedisRateLimiter(redis.url, share=0.5)
    redis.stop()
    assert [await let_in(limiter, "alice", limits) for _ in range(3)] == [True, True, False]
    redis.start()
    caplog.set_level("INFO")
    assert await let_in(limiter, "alice", limits)
    said = [record.message for record in caplog.records if "limits of keys" in record.message]
    assert len(said) == 2
    assert said[1] == "Redis counts the limits of keys again"


def test_an_address_that_is_none_of_redis_is_refused_and_its_password_is_not_shown() -> None:
    with pytest.raises(ValueError, match="limits_redis\n.*must begin with"):
        AuthSettings.model_validate({"limits_redis": "http://redis:6379"})
    assert "secret" not in repr(AuthSettings.model_validate({"limits_redis": "redis://:secret@redis:6379/0"}))
