"""What the Hub's answers are made of: digests, ranges, slow bodies, refusals."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

LFS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".onnx")
CHUNK_BYTES = 16 * 1024


def listen(port: int = 0) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    # Listening before the server runs: whoever connects early waits in the backlog, so nobody has to poll.
    listener.listen(128)
    return listener


def refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    marks = {"x-error-code": code, "x-error-message": message, **(headers or {})}
    return JSONResponse({"error": message}, status, headers=marks)


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    asked = request.headers.get("range", "")
    if not asked.startswith("bytes="):
        return Response(content, headers=headers)
    first, _, last = asked.removeprefix("bytes=").partition("-")
    begin = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last) + 1, len(content)) if last and first else len(content)
    if begin >= len(content):
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{len(content)}"})
    headers |= {"content-range": f"bytes {begin}-{end - 1}/{len(content)}"}
    return Response(content[begin:end], status_code=206, headers=headers)


def slowed(response: Response, bytes_per_s: float | None) -> Response:
    if bytes_per_s is None or response.status_code >= 300:
        return response
    body, rate = bytes(response.body), bytes_per_s
    step = max(1, min(CHUNK_BYTES, int(rate / 20)))

    async def trickle() -> AsyncIterator[bytes]:
        started = time.monotonic()
        for begin in range(0, len(body), step):
            await asyncio.sleep(max(0.0, started + begin / rate - time.monotonic()))
            yield body[begin : begin + step]

    headers = dict(response.headers)
    return StreamingResponse(trickle(), status_code=response.status_code, headers=headers)


def broken_off(response: Response, after_bytes: int | None) -> Response:
    """Send the first bytes of what the headers promise, and then hang up."""
    if after_bytes is None or response.status_code >= 300:
        return response
    body, headers = bytes(response.body), dict(response.headers)

    async def first() -> AsyncIterator[bytes]:
        yield body[:after_bytes]

    return StreamingResponse(first(), status_code=response.status_code, headers=headers)


def card_data(readme: bytes) -> dict[str, object]:
    parts = readme.decode().split("---\n")
    data = yaml.safe_load(parts[1]) if len(parts) >= 3 and not parts[0].strip() else None
    return json.loads(json.dumps(data, default=str)) if isinstance(data, dict) else {}


def texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def blob_facts(name: str, content: bytes) -> dict[str, object]:
    facts: dict[str, object] = {"size": len(content), "blobId": git_oid(content)}
    if name.endswith(LFS_SUFFIXES):
        facts["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
    return facts


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
