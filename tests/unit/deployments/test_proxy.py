from __future__ import annotations

import pytest
from ray.serve._private.http_util import validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path
from starlette.types import Receive, Scope, Send

from serve_app.deployments.proxy import ServeHeaderFilter, guards
from serve_app.environment import PROXY_GUARDS


async def passed_on(*headers: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def nothing(*_: object) -> None: ...

    await ServeHeaderFilter(app)({"type": "http", "headers": list(headers)}, nothing, nothing)  # type: ignore[arg-type]
    return seen[0]["headers"]


@pytest.mark.parametrize(
    "name",
    [
        b"serve_multiplexed_model_id",
        b"Serve-Multiplexed-Model-Id",
        b"x-session-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-request-age-s",
        b"X-Request-Seed",
    ],
)
async def test_headers_that_steer_serve_are_taken_away(name: bytes) -> None:
    lora = (b"lora", b"demo/sdxl-sepia")
    assert await passed_on((name, b"1"), lora) == [lora]


@pytest.mark.parametrize(
    "value", [b"", b"\xff\xfe", b"a b", b"a" * 129, b"<script>", b"hf_" + b"a" * 34, b"id-lpx_" + b"a" * 43]
)
async def test_an_id_that_no_log_should_hold_is_taken_away(value: bytes) -> None:
    assert await passed_on((b"x-request-id", value)) == []


async def test_a_sane_id_and_all_other_headers_stay() -> None:
    kept = [(b"x-request-id", b"mine-1"), (b"x-request-timeout-s", b"3"), (b"lora", b"\xff")]
    assert await passed_on(*kept) == kept


def test_serve_finds_the_guards_under_their_import_path() -> None:
    found = validate_http_proxy_callback_return(call_function_from_import_path(PROXY_GUARDS))
    assert [layer.cls for layer in found] == [layer.cls for layer in guards()]
