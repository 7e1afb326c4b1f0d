from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from starlette.testclient import TestClient

from serve_app.api.huggingface.schemas import Parameters


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_of_the_document_leads_somewhere(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    names = set(document["components"]["schemas"])
    found = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert {"InferenceBody", "Parameters", "LoraEntry", "TargetSize", "ErrorBody"} <= found <= names
    assert "HTTPValidationError" not in names


def test_the_document_has_every_route_and_its_replies(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/", "/health", "/models/{id}"} <= set(paths)
    replies = paths["/models/{id}"]["post"]["responses"]
    assert set(replies["200"]["content"]) == {"image/jpeg", "image/png", "image/webp"}
    assert {"400", "404", "406", "413", "422", "429", "500", "503", "504"} <= set(replies)
    assert {entry["name"] for entry in paths["/models/{id}"]["post"]["parameters"]} == {
        "id",
        "lora",
        "x-request-timeout-s",
        "x-wait-for-model",
        "x-request-id",
        "x-priority",
    }


def test_the_document_has_the_events_of_streams_and_the_headers_of_replies(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    reply = document["paths"]["/v1/images/generations"]["post"]["responses"]["200"]
    assert {"x-seed", "x-base-model", "x-adapters", "server-timing"} <= set(reply["headers"])
    events = reply["content"]["text/event-stream"]["schema"]["oneOf"]
    told = {name: event["properties"]["data"] for event in events for name in event["properties"]["event"]["enum"]}
    assert told["image_edit.completed"]["contentSchema"] == {"$ref": "#/components/schemas/CompletedEvent"}
    assert set(told) == {
        f"{kind}.{what}"
        for kind in ("image_generation", "image_edit")
        for what in ("starting", "progress", "partial_image", "completed")
    } | {"error"}
    assert set(told) - {"error"} == {
        name
        for model in ("StartingEvent", "ProgressEvent", "PartialImageEvent", "CompletedEvent")
        for name in document["components"]["schemas"][model]["properties"]["type"]["enum"]
    }
    for status in ("429", "503"):
        replies = document["paths"]["/"]["post"]["responses"]
        assert "retry-after" in replies[status]["headers"]


def test_operations_have_names_of_their_own(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    names = [operation["operationId"] for operations in paths.values() for operation in operations.values()]
    assert len(names) == len(set(names))


def test_the_document_describes_what_is_checked(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Parameters"]
    assert set(schema["properties"]) == set(Parameters.model_fields)
    assert schema["additionalProperties"] is False
    kinds = [option.get("type") for option in schema["properties"]["seed"]["anyOf"]]
    assert {"integer", "string", "null"} == set(kinds)


def test_the_page_shows_every_field_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/docs")
    assert response.status_code == 200
    assert "<!-- operations -->" not in response.text
    for name in Parameters.model_fields:
        assert f"<code>{name}</code>" in response.text
    assert not re.search(r"(src|href)=.https?:", response.text)
    assert json.loads(client.get("/openapi.json").text)["openapi"].startswith("3.")
