"""The OpenAPI document and a page that shows it.

Owns both; the schemas are pydantic's, from the very models that requests are checked with. The page is
rendered on the server and loads nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from serve_app.api.huggingface.schemas import InferenceBody
from serve_app.api.openai.schemas import EVENTS, ImageEditForm, ImageGeneration
from serve_app.api.pages.pages import asset_response, read_page
from serve_app.api.registry.schemas import NewLora, PreloadOrder

_BODIES = (InferenceBody, ImageGeneration, ImageEditForm, NewLora, PreloadOrder)
_SUMMARY = "Serves many LoRA adapters over a few diffusion base models: name one, get its image."


def build_document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document of the routes, with the models of the bodies that they read themselves."""
    document = get_openapi(title="Loraplex", version="1", summary=_SUMMARY, routes=routes)
    components = document.setdefault("components", {})
    # Either of them: a service without keys takes any caller.
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    known = components.setdefault("schemas", {})
    known.update(_schemas(_BODIES, "validation") | _schemas(EVENTS, "serialization"))
    return document


def _schemas(models: Sequence[type[BaseModel]], mode: JsonSchemaMode) -> dict[str, Any]:
    _, schemas = models_json_schema([(model, mode) for model in models], ref_template="#/components/schemas/{model}")
    return schemas["$defs"]


router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Show the document; its JSON has a route of FastAPI's own."""
    return asset_response(request, read_page("docs.html", operations=render(request.app.openapi())))


def render(document: dict[str, Any]) -> str:
    """Return the HTML of a document's operations and schemas."""
    parts: list[str] = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            replies = ", ".join(operation.get("responses", {}))
            parts.append(f"<p>Body: {_body(operation)}. Replies: {replies}.</p>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<h2 id="{escape(name)}"><code>{escape(name)}</code></h2>')
        parts.append(f"<p>{escape(schema.get('description', ''))}</p>")
        parts.append(_fields(schema))
    return "\n".join(parts)


def _body(operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    kinds = [f"{escape(kind)} ({_type(media.get('schema', {}))})" for kind, media in content.items()]
    return " or ".join(kinds) or "none"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td>{_type(field)}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"] if option.get("type") != "null")
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    if "const" in schema or "enum" in schema:
        return escape(", ".join(str(choice) for choice in schema.get("enum", [schema.get("const")])))
    return escape(str(schema.get("type", "any")))
