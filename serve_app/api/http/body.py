"""Request bodies: read under a limit, parsed as strict JSON.

Owns bytes to JSON values; which fields they may have is `serve_app.api.huggingface.schemas`'.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ByteSize, JsonValue
from pydantic_core import from_json
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from serve_app.api.http.waiting import ClientDisconnected
from serve_app.errors import BodyTimeout, MalformedRequest, TooLarge

MAX_DEPTH = 16
BODY_TIMEOUT_S = 30.0


async def read_body(request: Request, max_bytes: int, *, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return the whole body; one over the limit is refused as soon as its declared or real length is known.

    Raises:
        TooLarge: the body is over `max_bytes`.
        BodyTimeout: it was not there after `timeout_s`.
        ClientDisconnected: the caller hung up.
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
        raise ClientDisconnected from None
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


_INTEGER = re.compile(r"-?[0-9]{1,19}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Form:
    """A form as it was sent: text fields, the last of each name, and the files under each name.

    `name[]` is a list of text.
    """

    fields: Mapping[str, str | list[str]]
    files: Mapping[str, tuple[bytes, ...]]


async def read_form(headers: Headers, body: bytes) -> Form:
    """Return the form of a body.

    Raises:
        MalformedRequest: it is no multipart form.
    """
    if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise MalformedRequest("the body must be a multipart form with an 'image' file")

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request({"type": "http", "method": "POST", "headers": headers.raw}, replay)
    fields: dict[str, str | list[str]] = {}
    files: dict[str, list[bytes]] = {}
    try:
        async with request.form(max_files=16, max_fields=128) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(name.removesuffix("[]"), []).append(await value.read())
                elif name.endswith("[]"):
                    entries = fields.setdefault(name.removesuffix("[]"), [])
                    fields[name.removesuffix("[]")] = [*entries, value] if isinstance(entries, list) else [value]
                else:
                    fields[name] = value
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "it is damaged"
        raise MalformedRequest(f"the multipart form cannot be read: {reason}") from None
    return Form(fields, {name: tuple(contents) for name, contents in files.items()})


def typed(model: type[BaseModel], fields: Mapping[str, str | list[str]]) -> dict[str, Any]:
    """Return text fields as the JSON values that a model expects: numbers, booleans; empty text means absent."""
    values: dict[str, Any] = {}
    for name, text in fields.items():
        field = model.model_fields.get(name)
        if isinstance(text, list) or field is None:
            values[name] = text
        elif text or field.is_required():
            values[name] = _typed(text, _kinds(field.annotation))
    return values


def _typed(text: str, kinds: set[Any]) -> Any:
    if str in kinds or list in kinds:
        return text
    if bool in kinds and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if int in kinds and _INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and _NUMBER.fullmatch(text):
        return float(text)
    return text


def _kinds(annotation: Any) -> set[Any]:
    """Return the JSON types that an annotation such as `Literal[False] | None` allows."""
    if annotation in (str, int, float, bool):
        return {annotation}
    inner = get_args(annotation)
    if getattr(annotation, "__origin__", None) is list:
        return {list}
    kinds: set[Any] = set()
    for part in inner:
        if isinstance(part, (str, int, bool)):
            kinds.add(type(part))
        else:
            kinds |= _kinds(part)
    return kinds
