"""The real service against its own OpenAPI document: a few requests of each operation, made up from it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks

from serve_app.api.app import create_app
from serve_app.config import IngressSettings
from tests.service import Service
from tests.unit.api.fakes import FakeGateway

# Of the first test this is also the time in which cluster and service start.
pytestmark = pytest.mark.timeout(1200)

load_all_checks()
KEPT = CHECKS.get_by_names(
    [
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)
# What is accepted may ask for fifty steps; a deadline is an answer too.
QUICKLY = {"x-request-timeout-s": "1"}
# The registry's changes would change what other tests find.
SCHEMA = schemathesis.openapi.from_dict(create_app(FakeGateway(), IngressSettings()).openapi()).exclude(
    path_regex="^/v1/loras", method_regex="POST|DELETE"
)


@SCHEMA.parametrize()
@settings(
    max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
def test_every_reply_of_the_real_service_is_one_that_the_document_knows(
    service: Service, case: schemathesis.Case
) -> None:
    reply = case.call(base_url=service.url, headers=QUICKLY, timeout=60)
    assert reply.status_code != 500, reply.text
    case.validate_response(reply, checks=KEPT)
