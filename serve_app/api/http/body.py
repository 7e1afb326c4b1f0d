"""Request bodies: read under a limit, parsed as strict JSON.

Owns bytes to JSON values; which fields they may have is `serve_app.api.huggingface.schemas`'.
"""

from __future__ import annotations

import asyncio

from pydantic import ByteSize, JsonValue
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from serve_app.api.http.waiting import CallerGone
from serve_app.errors import BodyTimeout, MalformedRequest, TooLarge

MAX_DEPTH = 16
BODY_TIMEOUT_S = 30.0


async def read_body(request: Request, max_bytes: int, *, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return the whole body; one over the limit is refused as soon as its declared or real length is known.

    Raises:
        TooLarge: the body is over `max_bytes`.
        BodyTimeout: it was not there after `timeout_s`.
        CallerGone: the caller hung up.
    """
    too_large = TooLarge("the body", ByteSize(max_bytes).human_readable())
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size_bytes += len(chunk)
                if size_bytes > max_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTimeout(timeout_s) from None
    except ClientDisconnect:
        raise CallerGone from None
    return b"".join(chunks)


def parse_json(body: bytes) -> JsonValue:
    """Return the JSON value of a body: UTF-8, finite numbers, at most `MAX_DEPTH` levels deep.

    Raises:
        MalformedRequest: it is none of that.
    """
    if not body.strip():
        raise MalformedRequest('the body is empty; send JSON such as {"inputs": "a prompt"}')
    try:
        value: JsonValue = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None
    if _is_deeper(value, MAX_DEPTH):
        raise MalformedRequest(f"the body is nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deeper(value: JsonValue, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    if levels == 0:
        return True
    inner = value.values() if isinstance(value, dict) else value
    return any(_is_deeper(item, levels - 1) for item in inner)
