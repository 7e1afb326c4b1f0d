"""Another application on the same cluster, behind the same proxy: nothing of it is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx
import pytest
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from serve_app.deployments.front.load_shedding import SLACK_REQUESTS
from tests.replicas.controlled import MAX_ONGOING, MAX_QUEUED, Device
from tests.service import Service

APP = "billing"
# More than our layers let in beside those that our application holds.
CALLERS = MAX_ONGOING + MAX_QUEUED + SLACK_REQUESTS + 1
PATIENCE_S = 120.0
BODY = {"inputs": "a house", "parameters": {"num_inference_steps": 2}}


@serve.deployment(max_ongoing_requests=2 * CALLERS)
class Billing:
    """Writes down each call, and fails as an application's own upstream may."""

    def __init__(self, calls: Path) -> None:
        self._calls = calls
        self._crowd = 0
        self._is_complete = asyncio.Event()

    async def __call__(self, request: Request) -> JSONResponse:
        with self._calls.open("a") as calls:
            calls.write(f"{request.headers.get('x-session-id')}\n")
        if request.url.path.endswith("/crowd"):
            await self._be_one_of_a_crowd()
        return JSONResponse({"said": "declined"}, int(request.query_params["status"]), {"retry-after": "7"})

    async def _be_one_of_a_crowd(self) -> None:
        """Wait until all callers are here at the same time."""
        self._crowd += 1
        if self._crowd == CALLERS:
            self._is_complete.set()
        await asyncio.wait_for(self._is_complete.wait(), PATIENCE_S)


@pytest.fixture(scope="module")
def billing(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("billing") / "calls"
    serve.run(Billing.bind(path), name=APP, route_prefix=f"/{APP}")
    yield path
    serve.delete(APP)


@pytest.fixture
def calls(billing: Path) -> Path:
    """The file in which the other application writes down its calls, empty."""
    billing.write_text("")
    return billing


@pytest.mark.parametrize("status", [404, 429, 500, 502, 503])
def test_a_failing_post_of_another_application_runs_once_and_its_reply_is_its_own(
    service: Service, calls: Path, status: int
) -> None:
    url = f"{service.url}/{APP}/charge?status={status}"
    reply = httpx.post(url, content=b"10 EUR", headers={"x-session-id": "s1"}, timeout=PATIENCE_S)
    assert (reply.status_code, reply.json(), reply.headers["retry-after"]) == (status, {"said": "declined"}, "7")
    assert calls.read_text() == "s1\n"


def test_requests_of_ours_come_through_the_layers(service: Service) -> None:
    assert service.http.get("/health?verbose").json()["notices"] == []


@pytest.mark.slow
def test_callers_of_another_application_are_refused_nothing_while_ours_is_full(
    controlled: tuple[Service, Device], cluster: int, calls: Path
) -> None:
    service, device = controlled

    def draw(_: int) -> int:
        return service.http.post("/", json=BODY).status_code

    def charge(_: int) -> int:
        url = f"http://127.0.0.1:{cluster}/{APP}/crowd?status=200"
        return httpx.post(url, timeout=2 * PATIENCE_S).status_code

    with ThreadPoolExecutor(2 * CALLERS) as pool:
        with device.held():
            flood = [pool.submit(draw, number) for number in range(CALLERS)]
            # At least one is refused: from then on the layers know that ours is full.
            refused = next(call for call in as_completed(flood))
            theirs = list(pool.map(charge, range(CALLERS)))
        drawn = [call.result() for call in flood]
    assert refused.result() == 429
    assert theirs == [200] * CALLERS
    assert set(drawn) == {200, 429}
