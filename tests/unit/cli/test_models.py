from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from serve_app.catalog.replica_report import ModelInfo
from serve_app.errors import Unauthorized
from serve_app.settings import Canary
from tests.unit.api.fakes import FakeGateway, served
from tests.unit.cli.conftest import Doorkeeper, Run


@pytest.fixture
def deaf_url() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def free_url() -> Iterator[str]:
    """An address at which nothing listens, and nobody else can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_adapters_are_listed_below_their_base(run: Run, url: str) -> None:
    result = run("models", "--url", url)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "demo/sdxl",
        "  demo/sdxl-sepia",
        "  demo/sdxl-night",
        "demo/sd15",
        "  demo/sd15-night",
        f"2 bases and 3 adapters at {url}",
    ]


def test_what_bases_do_is_listed(run: Run, url: str) -> None:
    result = run("bases", "status", "--url", url)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["demo/sdxl: running"]


def test_a_canary_is_listed_with_its_share(run: Run, url: str, gateway: FakeGateway) -> None:
    gateway.registry.shared = {"demo/other": Canary(base="demo/sdxl", share=0.05)}
    result = run("bases", "status", "--url", url)
    assert result.stdout.splitlines() == ["demo/sdxl: running, 5.00% of the requests for demo/other"]


def test_the_address_may_come_from_the_environment_and_end_in_a_slash(run: Run, url: str) -> None:
    assert run("models", LORAPLEX_URL=f"{url}/").exit_code == 0


def test_models_are_printed_as_json(run: Run, url: str) -> None:
    told = json.loads(run("models", "--url", url, "--json").stdout)
    assert {"id": "demo/sdxl-sepia", "base_id": "demo/sdxl"} in told["models"]
    assert {"id": "demo/sdxl", "base_id": None} in told["models"]


def test_every_page_is_read(run: Run, url: str, gateway: FakeGateway) -> None:
    adapters = tuple(ModelInfo(f"a/b{number}", "demo/sdxl", "loraplex", 0) for number in range(1500))
    gateway.known = (*gateway.known, *adapters)
    assert len(json.loads(run("models", "--url", url, "--json").stdout)["models"]) == 1505


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_key_is_sent_and_never_printed(run: Run, url: str, door: Doorkeeper, how: str) -> None:
    if how == "option":
        result = run("models", "--url", url, "--key", "sesame")
    else:
        result = run("models", "--url", url, LORAPLEX_KEY="sesame")
    assert door.shown == ["Bearer sesame"]
    assert "sesame" not in result.output


def test_without_a_key_none_is_sent(run: Run, url: str, door: Doorkeeper) -> None:
    run("models", "--url", url)
    assert door.shown == [None]


def test_a_service_that_is_away_is_told_in_one_line(run: Run, free_url: str) -> None:
    result = run("models", "--url", free_url)
    assert result.exit_code == 1
    assert result.stderr == f"error: no service at {free_url}; start one with: loraplex serve FILE\n"


def test_with_json_a_failure_is_json_too(run: Run, free_url: str) -> None:
    result = run("models", "--url", free_url, "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert json.loads(result.stdout)["error"]["code"] == "no_service"


def test_an_answer_that_does_not_come_in_time_is_told(run: Run, deaf_url: str, tmp_path: object) -> None:
    result = run("generate", "a cat", "-o", f"{tmp_path}/cat.png", "--url", deaf_url, "--timeout", "0.2")
    assert result.exit_code == 1
    assert "did not answer within 0.2 s" in result.stderr


@pytest.mark.parametrize("status", [200, 404, 502])
def test_something_else_at_that_address_is_told(run: Run, status: int) -> None:
    async def page(request: object) -> PlainTextResponse:
        return PlainTextResponse("<html>hello</html>", status)

    with served(Starlette(routes=[Route("/v1/models", page)])) as url:
        result = run("models", "--url", url)
    assert result.exit_code == 1
    assert "Loraplex" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_json_of_another_shape_is_told(run: Run) -> None:
    async def page(request: object) -> JSONResponse:
        return JSONResponse({"data": [{"name": "x"}]})

    with served(Starlette(routes=[Route("/v1/models", page)])) as url:
        assert "is no Loraplex service" in run("models", "--url", url).stderr


def test_a_refusal_is_the_service_s_own_sentence(run: Run, url: str, gateway: FakeGateway, tmp_path: object) -> None:
    gateway.failure = Unauthorized("the key is not known")
    result = run("generate", "a cat", "-o", f"{tmp_path}/cat.png", "--url", url)
    assert (result.exit_code, result.stderr) == (1, "error: the key is not known\n")


def test_names_are_completed_from_the_service(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.cli.models.COMPLETION_TIMEOUT_S", 60.0)
    result = run(
        _LORAPLEX_COMPLETE="complete_bash", COMP_WORDS="loraplex generate --lora demo/sdxl-", COMP_CWORD="3",
        LORAPLEX_URL=url,
    )  # fmt: skip
    assert result.stdout.split() == ["demo/sdxl-sepia", "demo/sdxl-night"]


@pytest.mark.parametrize("address", ["free_url", "deaf_url"])
def test_completion_is_silent_while_no_service_answers(run: Run, request: pytest.FixtureRequest, address: str) -> None:
    result = run(
        _LORAPLEX_COMPLETE="complete_bash", COMP_WORDS="loraplex generate --lora demo/", COMP_CWORD="3",
        LORAPLEX_URL=request.getfixturevalue(address),
    )  # fmt: skip
    assert (result.exit_code, result.output.strip()) == (0, "")
