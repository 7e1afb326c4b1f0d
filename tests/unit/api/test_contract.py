"""The HTTP face against its own OpenAPI document: valid in itself, and kept in requests made up from it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import openapi_spec_validator
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks

from serve_app.api.app import create_app
from serve_app.config import BaseModelConfig, IngressSettings
from serve_app.core import GenerationEvent, GenerationResult, UnresolvedRequest
from serve_app.deployments.ingress.resolve_defaults import resolve_defaults
from tests.service import base_settings
from tests.unit.api.fakes import FakeGateway

BASE = BaseModelConfig.model_validate(base_settings("demo/sdxl"))


class BoundedGateway(FakeGateway):
    """Refuses what a real base would, and draws the rest."""

    async def generate(self, draft: UnresolvedRequest, *, request_id: str) -> GenerationResult:
        resolve_defaults(draft, BASE, (), request_id=request_id, seed=0)
        return await super().generate(draft, request_id=request_id)

    async def stream(self, draft: UnresolvedRequest, *, request_id: str) -> AsyncGenerator[GenerationEvent]:
        resolve_defaults(draft, BASE, (), request_id=request_id, seed=0)
        async for event in super().stream(draft, request_id=request_id):
            yield event


APP = create_app(BoundedGateway(), IngressSettings(), request_timeout_s=5)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
# What a base can draw is not in the document, so that not all that fits the document is accepted.
load_all_checks()
KEPT = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "unsupported_method",
    ]
)


def test_the_document_is_a_valid_one() -> None:
    openapi_spec_validator.validate(APP.openapi())


@SCHEMA.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_reply_is_one_that_the_document_knows(case: schemathesis.Case) -> None:
    # A caller who leaves no time gets a 504, which the check of statuses would take for a failure of ours.
    if case.headers:
        case.headers.pop("x-request-timeout-s", None)
    case.call_and_validate(checks=KEPT)
