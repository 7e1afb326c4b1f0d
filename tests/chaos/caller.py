"""One request of the chaos run, as a load balancer sends it: to another proxy where one gives no answer at all.

Owns what an answer is: an image as it should be, an error that says "retry", another error, or silence.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.chaos.pictures import Picture, generation_body, inference_body, input_png

RAW, OPENAI, STREAM = "raw", "openai", "stream"

# The service's own time for a request, and ours: whoever has heard nothing by then has been forgotten.
REQUEST_S, HUNG_S = 240.0, 270.0
CONNECT_S, CONNECT_PAUSE_S = 20.0, 0.05
# Of 504 too: that a time is over says nothing against another try.
RETRYABLE_STATUSES = frozenset((429, 503, 504))
# What every message says that invites another try; an event of a stream has no status.
RETRYABLE_MESSAGE = "try again"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """Images as they came; `batch_size` None where the reply does not say with how many others they were drawn."""

    images: tuple[Pixels, ...]
    batch_size: int | None


class Refused(Exception):
    """An answer that is no image; `is_retryable` where it says that asking again may succeed."""

    def __init__(self, what: str, *, is_retryable: bool) -> None:
        super().__init__(what)
        self.what = what
        self.is_retryable = is_retryable


class Caller:
    """Sends requests to whichever proxy takes them: all of a machine's share one address.

    It makes a connection for each request, as one does with proxies that come and go.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.turned_away = 0
        self.sent_again = 0

    async def draw(self, picture: Picture, shape: str, adapter: str | None) -> BatchOutput:
        """Return the images of one picture.

        Raises:
            Refused: there are none.
            TimeoutError: there was no answer at all.
        """
        send = {RAW: self._raw, OPENAI: self._openai, STREAM: self._stream}[shape]
        try:
            async with asyncio.timeout(HUNG_S):
                return await send(picture, adapter)
        except httpx.TransportError as error:
            raise Refused(f"connection lost ({type(error).__name__})", is_retryable=True) from None

    @asynccontextmanager
    async def _answer(self, **request: Any) -> AsyncGenerator[httpx.Response]:
        """Send, and give the answer as soon as its head is here; once more where a connection ends before that."""
        until, is_again = time.monotonic() + CONNECT_S, False
        while True:
            try:
                reply = await self._http.send(self._http.build_request("POST", **request), stream=True)
                break
            except httpx.ConnectError:
                self.turned_away += 1
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(CONNECT_PAUSE_S)
            except httpx.TransportError:
                if is_again:
                    raise
                is_again = True
                self.sent_again += 1
        try:
            yield reply
        finally:
            await reply.aclose()

    async def _raw(self, picture: Picture, adapter: str | None) -> BatchOutput:
        asked = inference_body(picture, adapter)
        async with self._answer(url=f"/models/{picture.base}", json=asked, headers={"accept": "image/png"}) as reply:
            content = await reply.aread()
        _check(reply.status_code, content)
        return BatchOutput((_pixels(content),), int(reply.headers["x-batch-size"]))

    async def _openai(self, picture: Picture, adapter: str | None) -> BatchOutput:
        async with self._answer(**self._generation(picture, adapter, is_stream=False)) as reply:
            content = await reply.aread()
        _check(reply.status_code, content)
        images = tuple(_decoded(image["b64_json"]) for image in json.loads(content)["data"])
        return BatchOutput(images, int(reply.headers["x-batch-size"]))

    async def _stream(self, picture: Picture, adapter: str | None) -> BatchOutput:
        images: list[Pixels] = []
        async with self._answer(**self._generation(picture, adapter, is_stream=True)) as reply:
            if reply.status_code != 200:
                _check(reply.status_code, await reply.aread())
            async for line in reply.aiter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = event["error"]
                    raise Refused(f"event {error['code']}", is_retryable=RETRYABLE_MESSAGE in error["message"])
                if event["type"].endswith(".completed"):
                    images.append(_decoded(event["b64_json"]))
        if len(images) < picture.count:
            raise Refused("stream ended early", is_retryable=True)
        return BatchOutput(tuple(images), None)

    def _generation(self, picture: Picture, adapter: str | None, *, is_stream: bool) -> dict[str, Any]:
        body = generation_body(picture, adapter, is_stream=is_stream)
        if not picture.is_edit:
            return {"url": "/v1/images/generations", "json": body}
        fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
        return {"url": "/v1/images/edits", "data": fields, "files": {"image": input_png()}}


@asynccontextmanager
async def new_caller(url: str) -> AsyncGenerator[Caller]:
    """Open a caller."""
    async with httpx.AsyncClient(
        base_url=url,
        headers={"x-request-timeout-s": f"{REQUEST_S:g}"},
        timeout=httpx.Timeout(HUNG_S, connect=5.0),
        limits=httpx.Limits(max_keepalive_connections=0),
        trust_env=False,
    ) as http:
        yield Caller(http)


def _check(status: int, content: bytes) -> None:
    if status == 200:
        return
    try:
        said = json.loads(content)
        error = said.get("error")
        code = error["code"] if isinstance(error, dict) else said.get("code")
    except (ValueError, AttributeError, KeyError):
        code = content[:60].decode(errors="replace")
    raise Refused(f"{status} {code}", is_retryable=status in RETRYABLE_STATUSES)


def _decoded(text: str) -> Pixels:
    return _pixels(base64.b64decode(text))


def _pixels(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
