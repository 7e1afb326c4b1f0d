"""The parts of an operation in the OpenAPI document beside its body: refusals, and headers of requests and replies.

Owns those descriptions, one for both families. Must not know what the operations do.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

Replies = dict[int | str, dict[str, Any]]

_WITH_RETRY_AFTER = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_MEANINGS = {
    400: "the request cannot be read, or something in it is out of bounds",
    401: "no valid key",
    403: "the key or the service's Hub token may not do this",
    404: "neither a served base nor a known adapter",
    406: "no image format of Accept can be served",
    408: "the body did not arrive in time",
    413: "the body or a picture in it is too large",
    422: "the adapter exists, but cannot be applied",
    429: "as much waits as is accepted",
    431: "the headers and the address are too large together",
    500: "the service failed; the message names the request",
    503: "not now: a base is starting, or something it needs does not answer",
    504: "the request ran out of its time",
}


def refusals(body: type[BaseModel], *statuses: int) -> Replies:
    """Return the replies to refused requests, all with the same kind of body."""
    return {status: _refusal(body, status) for status in statuses}


def _refusal(body: type[BaseModel], status: int) -> dict[str, Any]:
    reply: dict[str, Any] = {"model": body, "description": _MEANINGS[status]}
    if status in _WITH_RETRY_AFTER:
        reply["headers"] = {"retry-after": _header("seconds after which to ask again", type="integer", minimum=0)}
    return reply


def header_parameter(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """Return an optional header of a request."""
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _header(description: str, **schema: Any) -> dict[str, Any]:
    return {"description": description, "schema": schema}


REQUEST_ID_PARAMETER = header_parameter(
    "x-request-id", "an id of the caller's own for the log and the reply; one is made where it is absent", type="string"
)
IMAGE_HEADERS: dict[str, Any] = {
    "x-seed": _header("the seed of each image", type="string"),
    "x-base-model": _header("the base that drew", type="string"),
    "x-adapters": _header("`id@revision;scale;layers matched` of each adapter", type="string"),
    "x-compute-type": _header("cpu, or the name of the GPU", type="string"),
    "x-compute-time": _header("seconds on the device", type="string"),
    "x-compute-characters": _header("length of the prompt", type="string"),
    "x-batch-size": _header("images that shared the device pass", type="string"),
    "x-warning": _header("what was done otherwise than asked, such as a prompt cut off", type="string"),
    "server-timing": _header("milliseconds of each stage", type="string"),
}
