"""The registry: which adapters are known and where they are resident, aliases, replicas and bases.

Owns `/v1/loras`, `/v1/replicas` and `/v1/bases` on the wire.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.api.http.body import parse_json, read_body
from serve_app.api.http.caller import hub_token_of
from serve_app.api.http.gateway import ServicesOf
from serve_app.api.http.schemas import ERROR_REPLIES, MAX_NAME_LENGTH, ErrorEnvelope, validate_model
from serve_app.api.http.validation import clip
from serve_app.api.http.waiting import TIMEOUT_PARAMETER, deadline_of, run_until_disconnect
from serve_app.api.registry.schemas import (
    AppliedLora,
    Base,
    BaseDefaults,
    BaseLimits,
    DeletedLora,
    FusedLora,
    HeldLora,
    Lora,
    LoraDefaultsReply,
    LoraList,
    NewLora,
    PreloadedLora,
    PreloadOrder,
    QuarantinedLora,
    Replica,
    ReplicaList,
    Residence,
    ScalesReply,
)
from serve_app.catalog.replica_report import BaseState, LoraReport, ReplicaReport
from serve_app.catalog.resolving.aliases import Alias
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterRef, Scale, Scales
from serve_app.errors import MalformedRequest, ModelNotFound, OutOfBounds
from serve_app.families.abilities import BaseAbilities

MAX_BODY_BYTES = 64 * 1024
_SCHEMES = ("hf://", "lora://")
_CHANGES: dict[int | str, dict[str, Any]] = {
    **ERROR_REPLIES,
    409: {"model": ErrorEnvelope, "description": "the name is taken"},
}
_BASES = TypeAdapter(list[Base])


def _body(schema: str, *, is_required: bool) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": is_required, "content": content}, "parameters": [TIMEOUT_PARAMETER]}


router = APIRouter(tags=["Registry"], default_response_class=Response)


@router.get("/v1/loras", operation_id="list_loras", responses={200: {"model": LoraList}, **ERROR_REPLIES})
async def loras(request: Request, services: ServicesOf) -> Response:
    """List the adapters and aliases known so far, where each is resident, and how much it is used."""
    rows = await services.gateway.registry.loras(token=hub_token_of(request))
    return _json(LoraList(data=[_lora(row) for row in rows]))


@router.get("/v1/loras/{name:path}", operation_id="get_lora", responses={200: {"model": Lora}, **ERROR_REPLIES})
async def lora(name: str, request: Request, services: ServicesOf) -> Response:
    """Say of one adapter or alias what the list would."""
    return _json(_lora(await services.gateway.registry.lora(checked_name(name), token=hub_token_of(request))))


@router.get("/v1/replicas", operation_id="list_replicas", responses={200: {"model": ReplicaList}, **ERROR_REPLIES})
async def replicas(request: Request, services: ServicesOf) -> Response:
    """List the replicas of every base: what each is doing, and which adapters it holds."""
    reports = await services.gateway.registry.replicas(token=hub_token_of(request))
    return _json(ReplicaList(data=[_replica(report) for report in reports]))


@router.get("/v1/bases", operation_id="list_bases", responses={200: {"model": list[Base]}, **ERROR_REPLIES})
async def bases(services: ServicesOf) -> Response:
    """List the bases, with the state, the defaults and the limits of each."""
    registry = services.gateway.registry
    default, served = registry.default_base(), registry.bases()
    reports, states = await asyncio.gather(registry.replicas(token=None), registry.states())
    known = {report.base_id: report.abilities for report in reports if report.abilities is not None}
    told = [
        _base(base, known.get(base.id), states.get(base.id, BaseState("starting")), is_default=base.id == default.id)
        for base in served
    ]
    rows = {row.id: row for row in told}
    for original, canary in registry.canaries().items():
        rows[canary.base] = rows[canary.base].model_copy(update={"canary_of": original, "share": canary.share})
    return Response(_BASES.dump_json(list(rows.values())), media_type="application/json")


@router.post(
    "/v1/loras",
    operation_id="add_lora",
    responses={200: {"model": Lora}, **_CHANGES},
    openapi_extra=_body("NewLora", is_required=True),
)
async def add(request: Request, services: ServicesOf) -> Response:
    """Give an adapter a further name, once it is known that it can be served."""
    deadline = deadline_of(request, services.request_timeout_s)
    asked = validate_model(NewLora, parse_json(await read_body(request, MAX_BODY_BYTES)))
    call = services.gateway.registry.add_alias(
        Alias(asked.lora_name, _target(asked)),
        may_replace=bool(asked.replace),
        preload=_preload_of(asked),
        token=hub_token_of(request),
    )
    return _json(_lora(await run_until_disconnect(request, call, deadline=deadline)))


# Before the route of a removal: the names of both may hold slashes.
@router.post(
    "/v1/loras/{name:path}/preload",
    operation_id="preload_lora",
    responses={200: {"model": PreloadedLora}, **ERROR_REPLIES},
    openapi_extra=_body("PreloadOrder", is_required=False),
)
async def preload(name: str, request: Request, services: ServicesOf) -> Response:
    """Have some replicas fetch an adapter into memory; the reply comes once they hold it."""
    deadline = deadline_of(request, services.request_timeout_s)
    body = await read_body(request, MAX_BODY_BYTES)
    asked = validate_model(PreloadOrder, parse_json(body)) if body.strip() else PreloadOrder()
    call = services.gateway.registry.preload(checked_name(name), asked.replicas or 1, token=hub_token_of(request))
    done = await run_until_disconnect(request, call, deadline=deadline)
    return _json(PreloadedLora(id=name, asked=done.asked, replicas=list(done.replicas)))


@router.delete(
    "/v1/loras/{name:path}",
    operation_id="delete_lora",
    responses={200: {"model": DeletedLora}, **ERROR_REPLIES},
    openapi_extra={"parameters": [TIMEOUT_PARAMETER]},
)
async def delete(name: str, request: Request, services: ServicesOf) -> Response:
    """Remove an alias, and have every replica forget the adapter once no request uses it."""
    deadline = deadline_of(request, services.request_timeout_s)
    await read_body(request, MAX_BODY_BYTES)
    call = services.gateway.registry.remove(checked_name(name), token=hub_token_of(request))
    done = await run_until_disconnect(request, call, deadline=deadline)
    return _json(DeletedLora(id=done.id, deleted=done.was_alias, replicas=list(done.replicas)))


def checked_name(name: str) -> str:
    """Return the name in a route.

    Raises:
        ModelNotFound: it is longer than any name is.
    """
    if len(name) > MAX_NAME_LENGTH:
        raise ModelNotFound(clip(name), f"a name has at most {MAX_NAME_LENGTH} characters")
    return name


def _target(asked: NewLora) -> AdapterRef:
    uri = asked.source.uri.strip()
    for scheme in _SCHEMES:
        uri = uri.removeprefix(scheme)
    if "://" in uri or uri.startswith(("/", ".", "~")):
        raise MalformedRequest("'source.uri' must be an id such as 'owner/name', never an address or a path")
    return AdapterRef(
        uri,
        revision=asked.source.revision,
        filename=asked.source.filename,
        defaults=NO_DEFAULTS if asked.defaults is None else asked.defaults.value(),
    )


def _preload_of(asked: NewLora) -> int:
    if asked.preload is None or isinstance(asked.preload, bool):
        return int(bool(asked.preload))
    if not 0 <= asked.preload <= 1000:
        raise OutOfBounds("preload", asked.preload, "true, false or a number of replicas up to 1000")
    return asked.preload


def _json(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")


def _lora(row: LoraReport) -> Lora:
    spec = row.adapter.spec
    return Lora(
        id=row.id,
        revision=spec.revision,
        base_model=spec.base_id,
        rank=row.adapter.rank,
        has_picture=row.adapter.has_picture,
        size_bytes=spec.size_bytes,
        layers_matched=row.layers_matched,
        alias_of=row.alias_of,
        aliases=list(row.aliases),
        resident=[Residence(replica=replica, tier=tier) for replica, tier in row.resident],
        hits=row.hits,
        last_used=row.last_used_s,
        instance_prompt=spec.defaults.trigger_words,
        defaults=_defaults(spec.defaults),
        quarantine=[
            QuarantinedLora(
                replica=replica,
                scale=_scale(held.scales[held.keys.index(spec.key)]),
                beside=len(held.keys) - 1,  # not which: the caller may not be allowed to see them
                reason=held.reason,
                retry_after_s=held.left_s,
            )
            for replica, held in row.quarantined
        ],
    )


def _defaults(defaults: AdapterDefaults) -> LoraDefaultsReply:
    return LoraDefaultsReply(
        scale=defaults.scale,
        num_inference_steps=defaults.steps,
        guidance_scale=defaults.guidance_scale,
        scheduler=defaults.scheduler,
        scheduler_options=dict(defaults.scheduler_options),
        sigmas=None if defaults.sigmas is None else list(defaults.sigmas),
        timesteps=None if defaults.timesteps is None else list(defaults.timesteps),
        negative_prompt=defaults.negative_prompt,
        trigger_words=defaults.trigger_words,
    )


def _replica(report: ReplicaReport) -> Replica:
    return Replica(
        id=report.id,
        base_model=report.base_id,
        state=report.state,
        device=report.device,
        waiting=report.waiting,
        running=report.running,
        applied=[AppliedLora(id=part.id, scale=_scale(part.scale)) for part in report.applied],
        adapters=[HeldLora(id=held.id, tier="host" if held.tier == "host" else "device") for held in report.holdings],
        backlog_s=round(report.backlog_s, 3),
    )


def _scale(scale: Scale) -> float | ScalesReply:
    if isinstance(scale, Scales):
        return ScalesReply(denoiser=scale.denoiser, text_encoder=scale.text_encoder)
    return scale


def _base(base: BaseModelConfig, known: BaseAbilities | None, state: BaseState, *, is_default: bool) -> Base:
    limits = BaseLimits(**base.limits.model_dump())
    schedulers = list(base.schedulers or ())
    told = Base(
        id=base.id,
        aliases=list(base.aliases),
        is_default=is_default,
        state=state.state,
        since=state.since_s,
        expected_s=state.expected_s,
        reason=state.reason,
        defaults=BaseDefaults(**base.defaults.model_dump()),
        limits=limits,
        fused=[FusedLora(id=one.id, scale=one.scale) for one in base.fused],
        schedulers=schedulers,
        prompt_syntax=base.prompt_syntax,
        fuses_adapters=None if base.quantization is None else False,
    )
    if known is None:
        return told
    return told.model_copy(
        update={
            "defaults": told.defaults.model_copy(update=dict(known.defaults)),
            "limits": limits.model_copy(update={"side_multiple": known.side_multiple, "min_steps": known.min_steps}),
            "schedulers": list(known.schedulers),
            "family": known.family,
            "tasks": {task: list(parameters) for task, parameters in known.parameters.items()},
            "tokens": known.tokens,
            "has_previews": known.previews,
            "prompt_syntaxes": list(known.prompt_syntaxes),
            "fuses_adapters": known.fuses_adapters,
        }
    )
