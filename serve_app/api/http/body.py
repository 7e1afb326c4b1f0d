"""Request bodies: read under a limit, parsed as strict JSON or as a form.

Owns bytes to JSON values, and what those may weigh before anybody looks at them; which fields they may have is
`serve_app.api.huggingface.schemas`'.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ByteSize, JsonValue
from pydantic_core import from_json
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from serve_app.api.http.validation import clip
from serve_app.api.http.waiting import ClientDisconnected
from serve_app.api.pictures.images import is_base64_image
from serve_app.errors import BodyTimeout, MalformedRequest, TooLarge

MAX_DEPTH = 16
# Of a whole body: 64 adapters with all that can be said of each are a tenth of it.
MAX_VALUES = 4096
# Up to here parsing takes less time than the way to a thread and back.
SMALL_BYTES = 16 * 1024
# A string of this length in a body is cut out of it before the rest is parsed.
LONG_STRING_BYTES = 64 * 1024
BODY_TIMEOUT_S = 30.0


async def read_body(request: Request, max_bytes: int, *, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Return the whole body; one over the limit is refused as soon as its declared or real length is known.

    Raises:
        MalformedRequest: it is compressed.
        TooLarge: the body is over `max_bytes`.
        BodyTimeout: it was not there after `timeout_s`.
        ClientDisconnected: the caller hung up.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise MalformedRequest(f"the body has content-encoding '{clip(encoding)}'; send it uncompressed")
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


async def read_json(body: bytes, *, max_bytes: int, pictures: Sequence[str] = ()) -> JsonValue:
    """Return the JSON value of a body, parsed away from the event loop unless it is small.

    A picture in base64 in a field of `pictures` may be longer than `max_bytes`: it is not parsed but taken out.

    Raises:
        MalformedRequest: it is no JSON, or too deep.
        TooLarge: without such a string it is over `max_bytes`, or it has too many values.
    """
    if len(body) <= SMALL_BYTES:
        return parse_json(body)
    return await asyncio.to_thread(_parse_large, body, max_bytes, pictures)


def _parse_large(body: bytes, max_bytes: int, pictures: Sequence[str]) -> JsonValue:
    too_large = TooLarge("the JSON", f"{ByteSize(max_bytes).human_readable()}, a picture in base64 aside")
    if len(body) <= max_bytes:
        return parse_json(body)
    cut = _long_string(body) if pictures else None
    if cut is None or len(body) - (cut.stop - cut.start) > max_bytes:
        raise too_large
    # A caller cannot know it, so that it stands where the string stood and nowhere else.
    mark = secrets.token_hex(16)
    value = parse_json(body[: cut.start] + mark.encode() + body[cut.stop :])
    field = next((name for name in pictures if isinstance(value, dict) and value.get(name) == mark), None)
    if field is None or not isinstance(value, dict):
        raise too_large
    # Undo what encoders of JSON and base64 add; any other character outside base64 refuses the picture.
    text = body[cut].replace(b"\\/", b"/").replace(b"\\n", b"").replace(b"\\r", b"").decode("ascii", "replace")
    if not is_base64_image(text):
        raise too_large
    value[field] = text
    return value


def _long_string(body: bytes) -> slice | None:
    """Return where the first string of at least twice `LONG_STRING_BYTES` stands, without its quotes."""
    position = LONG_STRING_BYTES
    while position < len(body):
        begin, end = body.rfind(b'"', 0, position), body.find(b'"', position)
        if begin < 0 or end < 0:
            return None
        if end - begin > 2 * LONG_STRING_BYTES:
            return slice(begin + 1, end)
        position = max(end + 1, position + LONG_STRING_BYTES)
    return None


def parse_json(body: bytes, name: str = "the body") -> JsonValue:
    """Return the JSON value of a body, or of the text in a field: UTF-8, finite numbers, `MAX_DEPTH` levels at most.

    Raises:
        MalformedRequest: it is none of that, or an object has a name twice.
        TooLarge: it has more than `MAX_VALUES` values.
    """
    if not body.strip():
        raise MalformedRequest('the body is empty; send JSON such as {"inputs": "a prompt"}')
    try:
        value: JsonValue = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise MalformedRequest(f"{name} is not JSON: {error}") from None
    _check_shape(value, name)
    # That parser takes the last of each name and says nothing.
    json.loads(body, object_pairs_hook=_check_names, parse_int=str, parse_float=str)
    return value


def _check_names(pairs: list[tuple[str, JsonValue]]) -> None:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise MalformedRequest(f"the JSON has '{clip(name)}' twice in one object")
        names.add(name)


def _check_shape(value: JsonValue, name: str) -> None:
    """Refuse what would take long to look through, as soon as that is seen."""
    level, count = [value], 1
    for _ in range(MAX_DEPTH + 1):
        below: list[JsonValue] = []
        for item in level:
            if isinstance(item, (dict, list)):
                count += len(item)
                if count > MAX_VALUES:
                    raise TooLarge("the number of values in the JSON", str(MAX_VALUES))
                below.extend(item.values() if isinstance(item, dict) else item)
        if not below:
            return
        level = below
    raise MalformedRequest(f"{name} is nested more than {MAX_DEPTH} levels deep")


_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_OBJECT_FIELD = re.compile(r"(?P<list>\w{1,64})(?:\[(?P<index>[0-9]{0,3})\])?\[(?P<key>[A-Za-z_]\w{0,63})\]", re.ASCII)
# A number in such an object.
_NUMBERS = ("scale", "weight")


@dataclass(frozen=True, slots=True)
class Form:
    """A form as it was sent: text fields, without those that are empty, and the files under each name.

    `name[]` is a list of text; `name[key]`, `name[][key]` and `name[0][key]` are a list of objects.
    """

    fields: Mapping[str, Any]
    files: Mapping[str, tuple[bytes, ...]]


async def read_form(headers: Headers, body: bytes) -> Form:
    """Return the form of a body, taken apart away from the event loop unless it is small.

    Raises:
        MalformedRequest: it is no multipart form, or has a field twice.
    """
    if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise MalformedRequest("the body must be a multipart form with an 'image' file")
    if len(body) <= SMALL_BYTES:
        return await _form_of(headers, body)
    return await asyncio.to_thread(asyncio.run, _form_of(headers, body))


async def _form_of(headers: Headers, body: bytes) -> Form:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request({"type": "http", "method": "POST", "headers": headers.raw}, replay)
    fields: dict[str, Any] = {}
    objects = _ObjectFields()
    files: dict[str, list[bytes]] = {}
    try:
        async with request.form(max_files=16, max_fields=128) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(name.removesuffix("[]"), []).append(await value.read())
                elif (found := _OBJECT_FIELD.fullmatch(name)) is not None:
                    objects.add(found["list"], found["index"] or "", found["key"], value)
                elif name.endswith("[]"):
                    entries = fields.setdefault(name.removesuffix("[]"), [])
                    fields[name.removesuffix("[]")] = [*entries, value] if isinstance(entries, list) else [value]
                elif name in fields:
                    raise MalformedRequest(f"the form has '{clip(name)}' twice; several adapters are one JSON text")
                else:
                    fields[name] = value
    except (MultiPartException, KeyError, UnicodeError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "it is damaged"
        raise MalformedRequest(f"the multipart form cannot be read: {reason}") from None
    given = {name: value for name, value in fields.items() if value or name == "prompt"}
    return Form(objects.joined_to(given), {name: tuple(contents) for name, contents in files.items()})


class _ObjectFields:
    """Objects that come field by field: numbered, or without a number in columns, as OpenAI's clients write them."""

    def __init__(self) -> None:
        self._lists: dict[str, dict[str, dict[str, str]]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, name: str, index: str, key: str, value: str) -> None:
        """Take one field."""
        if not index:
            self._counts[name, key] = self._counts.get((name, key), 0) + 1
            index = f"column {self._counts[name, key]}"
        self._lists.setdefault(name, {}).setdefault(index, {})[key] = value

    def joined_to(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return other fields with the objects beside them.

        Raises:
            MalformedRequest: a name comes both ways, or it cannot be told which fields belong together.
        """
        for name in self._lists:
            counts = {count for (counted, _), count in self._counts.items() if counted == name}
            if name in fields or len(counts) > 1:
                raise MalformedRequest(
                    f"it cannot be told which fields of '{clip(name)}' belong together; send it as JSON text"
                )
        lists = {name: list(rows.values()) for name, rows in self._lists.items()}
        return fields | {
            name: [{key: _number(text) if key in _NUMBERS else text for key, text in row.items()} for row in rows]
            for name, rows in lists.items()
        }


def _number(text: str) -> Any:
    return float(text) if _NUMBER.fullmatch(text) else text
