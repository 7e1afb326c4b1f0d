"""Who may use which route, by hand: a new route fails the tests of access until somebody has decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route

# Who gets in.
OPEN, KEYED, ADMIN = "open", "keyed", "admin"
# What of a private adapter a route could give away: nothing, that it is there, or what it draws.
NOTHING, LISTED, NAMED = "nothing", "listed", "named"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route needs, and what of a private adapter it is asked for."""

    needs: str
    private: str = NOTHING


MATRIX: dict[tuple[str, str], Rule] = {
    ("GET", "/"): Rule(OPEN),
    ("HEAD", "/"): Rule(OPEN),
    ("GET", "/health"): Rule(OPEN),
    ("HEAD", "/health"): Rule(OPEN),
    ("GET", "/static/{name}"): Rule(OPEN),
    ("HEAD", "/static/{name}"): Rule(OPEN),
    ("POST", "/"): Rule(KEYED, NAMED),
    ("POST", "/models/{id:path}"): Rule(KEYED, NAMED),
    ("POST", "/v1/images/generations"): Rule(KEYED, NAMED),
    ("POST", "/v1/images/edits"): Rule(KEYED, NAMED),
    ("GET", "/v1/models"): Rule(KEYED, LISTED),
    ("GET", "/v1/models/{id:path}"): Rule(KEYED, LISTED),
    ("GET", "/v1/loras"): Rule(KEYED, LISTED),
    ("GET", "/v1/loras/{name:path}"): Rule(KEYED, NAMED),
    # Drawn first: then there is one to read.
    ("POST", "/v1/pictures/{name:path}"): Rule(KEYED, NAMED),
    ("GET", "/v1/pictures/{name:path}"): Rule(KEYED, NAMED),
    ("GET", "/v1/replicas"): Rule(KEYED, LISTED),
    ("GET", "/v1/bases"): Rule(KEYED),
    ("GET", "/v1/usage"): Rule(ADMIN),
    ("GET", "/docs"): Rule(KEYED),
    ("GET", "/openapi.json"): Rule(KEYED),
    ("HEAD", "/openapi.json"): Rule(KEYED),
    ("POST", "/v1/loras"): Rule(ADMIN, NAMED),
    ("DELETE", "/v1/loras/{name:path}"): Rule(ADMIN, NAMED),
    ("POST", "/v1/loras/{name:path}/preload"): Rule(ADMIN, NAMED),
}


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Yield every method and path of an application."""
    for route in app.routes:
        assert isinstance(route, Route), f"{route} is no plain route: the matrix must learn of its kind"
        for method in sorted(route.methods or ()):
            yield method, route.path


def spellings(path: str) -> Iterator[str]:
    """Yield addresses that mean a route's path, or nearly so: encoded, doubled, suffixed, in other letters."""
    yield from (
        path + suffix for suffix in ("%0A", "%0D%0A", "%00", "%09", "%20", "%E2%80%A8", "/", "//", "/.", "?", ";")
    )
    yield from (f"/{path}", f"/.{path}", f"/x/..{path}", path.replace("/", "//"), path.replace("/", "/./"))
    yield from (path.upper(), path.title(), f"/{path[1:].replace('/', '%2F')}", f"/{path[1:].replace('/', '%5C')}")
    letter = next((place for place, sign in enumerate(path) if sign.isalpha()), None)
    if letter is not None:
        yield f"{path[:letter]}%{ord(path[letter]):02X}{path[letter + 1 :]}"
        yield f"{path[:letter]}%25{ord(path[letter]):02X}{path[letter + 1 :]}"


def request_of(method: str, path: str, *, adapter: str, model: str, image: bytes) -> tuple[str, dict[str, Any]]:
    """Return the address and the rest of a request to a route, which asks for an adapter where the route can be."""
    url = path.replace("{name:path}", adapter).replace("{id:path}", model).replace("{name}", "none.css")
    quick = {"num_inference_steps": 1}
    bodies: dict[str, Any] = {
        "/": {"inputs": "a cat", "parameters": {**quick, "loras": [adapter]}},
        "/models/{id:path}": {"inputs": "a cat", "parameters": quick},
        "/v1/images/generations": {"prompt": "a cat", "model": model, **quick},
        "/v1/loras": {"lora_name": "of-the-matrix", "source": {"uri": adapter}},
    }
    if path.endswith("edits"):
        fields = {"prompt": "a cat", "model": model, "num_inference_steps": "2"}
        return url, {"data": fields, "files": {"image": ("i.png", image)}}
    return url, {"json": bodies[path]} if method == "POST" and path in bodies else {}
