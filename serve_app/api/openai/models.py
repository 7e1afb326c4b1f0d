"""The models that a request may name, in the OpenAI shape: `/v1/models`.

Owns the list, its pages and the description of one.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.gateway import ServicesOf
from serve_app.api.http.schemas import ERROR_REPLIES
from serve_app.api.http.validation import clip
from serve_app.api.openai.schemas import Model, ModelList
from serve_app.catalog.replica_report import ModelInfo
from serve_app.errors import ModelNotFound, OutOfBounds

MAX_PAGE = 1000


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


router = APIRouter(tags=["OpenAI shape"], default_response_class=Response)


@router.get(
    "/v1/models",
    operation_id="list_models",
    responses={200: {"model": ModelList}, **ERROR_REPLIES},
    openapi_extra={
        "parameters": [
            _query("limit", "how many at most", type="integer", minimum=1, maximum=MAX_PAGE),
            _query("after", "the last id of the page before", type="string"),
        ]
    },
)
async def models(request: Request, services: ServicesOf) -> Response:
    """List the bases and the adapters known so far, at most `limit`, from the one behind `after` on."""
    page = _page(await services.gateway.models(), request.query_params.get("after"), _limit(request))
    return Response(page.model_dump_json(), media_type="application/json")


@router.get("/v1/models/{id:path}", operation_id="describe_model", responses={200: {"model": Model}, **ERROR_REPLIES})
async def model(id: str, services: ServicesOf) -> Response:
    """Describe a base or an adapter known so far."""
    found = next((info for info in await services.gateway.models() if info.id == id), None)
    if found is None:
        raise ModelNotFound(clip(id))
    return Response(_model(found).model_dump_json(), media_type="application/json")


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(MAX_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise OutOfBounds("limit", clip(text), f"a number from 1 to {MAX_PAGE}")
    return int(text)


def _page(models: tuple[ModelInfo, ...], after: str | None, limit: int) -> ModelList:
    ids = [info.id for info in models]
    if after is not None and after not in ids:
        raise ModelNotFound(clip(after), "'after' must be an id of the page before")
    start = 0 if after is None else ids.index(after) + 1
    page = models[start : start + limit]
    return ModelList(
        data=[_model(info) for info in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=start + limit < len(models),
    )


def _model(info: ModelInfo) -> Model:
    return Model(
        id=info.id,
        created=info.created,
        owned_by=info.owned_by,
        root=info.base_id or info.id,
        parent=info.base_id,
    )
