"""One base more or less on a running cluster: what Serve says of it goes in, what is deployed comes out."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from serve_app.cli.bases.changes import with_base, without_base
from serve_app.cli.bases.cluster import Cluster
from serve_app.cli.serve_file import check_serve_file
from serve_app.cli.terminal import CommandFailed
from tests.serve_files import applications
from tests.service import base_settings
from tests.unit.api.fakes import served
from tests.unit.cli.conftest import Run

ENTRY = base_settings("demo/third", source={"embedded": "demo/sd15"})
CANARIES = {"demo/sdxl": {"base": "demo/sd15", "share": 0.1}}
ENVIRONMENT = {"env_vars": {"A": "b"}}
OTHER = {"name": "other", "route_prefix": "/other", "import_path": "elsewhere:app", "args": {"deep": {"a": [1, None]}}}
BY_HAND = {"source": "imperative", "status": "RUNNING", "deployments": {"Model": {}}}


def running(config: dict[str, Any]) -> dict[str, Any]:
    return {"source": "declarative", "status": "RUNNING", "deployments": {}, "deployed_app_config": config}


def details(name: str = "loraplex", **settings: Any) -> dict[str, Any]:
    """What Serve says of a cluster with a service of two bases, another application, and one by `serve.run`."""
    bases = [base_settings("demo/sdxl"), base_settings("demo/sd15", aliases=["small"])]
    given = {"service": name, "adapters": {"embedded": True}, "bases": bases, **settings}
    ours = applications(given, name)
    ours[0] |= {"runtime_env": ENVIRONMENT, "route_prefix": f"/{name}"}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000, "request_timeout_s": 330.0},
        "target_capacity": 0.0,
        "applications": {one["name"]: running(one) for one in [*ours, OTHER]} | {"by-hand": BY_HAND},
    }


def named(file: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one for one in file["applications"]}


def test_a_base_is_added_to_the_ingress_and_as_an_application_and_nothing_else_changes() -> None:
    before = details()
    given = deepcopy(before)
    change = with_base(before, ENTRY)
    assert before == given
    assert change.bases == ("demo/sdxl", "demo/sd15", "demo/third")
    file, old = change.serve_file, {name: one.get("deployed_app_config") for name, one in given["applications"].items()}
    assert {name: file.get(name) for name in given if name != "applications"} == {
        name: given[name] for name in given if name != "applications"
    }
    new = named(file)
    assert set(new) == {"loraplex", "demo--sdxl", "demo--sd15", "other", "demo--third"}, "not what came by serve.run"
    assert all(new[name] == old[name] for name in ("demo--sdxl", "demo--sd15", "other"))
    assert new["demo--third"] == {
        "name": "demo--third",
        "route_prefix": None,
        "import_path": "serve_app.app:base",
        "runtime_env": ENVIRONMENT,
        "args": {"shared": old["loraplex"]["args"]["shared"], "base": ENTRY},
    }
    old["loraplex"]["deployments"][0]["user_config"]["bases"].append(ENTRY)
    assert new["loraplex"] == old["loraplex"]


def test_what_is_added_and_removed_again_leaves_what_was_deployed() -> None:
    before = details()
    added = with_base(before, ENTRY).serve_file
    after = before | {"applications": {one["name"]: running(one) for one in added["applications"]}}
    removed = named(without_base(after, "demo/third").serve_file)
    assert removed == {
        name: one["deployed_app_config"] for name, one in before["applications"].items() if "deployed_app_config" in one
    }


def two_services() -> dict[str, Any]:
    second = details("second", bases=[base_settings("demo/sd15", application="second-base")])
    return details() | {"applications": details()["applications"] | second["applications"]}


def by_serve_run() -> dict[str, Any]:
    found = details()
    found["applications"]["loraplex"] |= {"source": "imperative", "deployments": {"LoraplexIngress": {}}}
    return found


def untold() -> dict[str, Any]:
    found = details()
    del found["applications"]["other"]["deployed_app_config"]
    return found


def leaving() -> dict[str, Any]:
    found = details()
    found["applications"]["demo--third"] = {"source": "declarative", "status": "DELETING", "deployments": {}}
    return found


@pytest.mark.parametrize(
    ("cluster", "entry", "application", "said"),
    [
        (details(), base_settings("demo/sd15"), None, "base demo/sd15 is there already"),
        (details(), base_settings("small"), None, "base small is there already"),
        (details(), {**ENTRY, "aliases": ["small"]}, None, "'small' names both demo/sd15 and demo/third"),
        (details(), {**ENTRY, "defualts": {}}, None, "base: unknown key 'defualts'; did you mean 'defaults'?"),
        (details(), {**ENTRY, "application": "other"}, None, "the cluster has an application other (RUNNING)"),
        (details(), {**ENTRY, "application": "by-hand"}, None, "the cluster has an application by-hand (RUNNING)"),
        (leaving(), ENTRY, None, "the cluster has an application demo--third (DELETING): wait"),
        (details(), {**ENTRY, "replica": {"max_backlog_s": 900}}, None, "is over shared.request_timeout_s"),
        (details(), ENTRY, "lorapelx", "the cluster has no service lorapelx; did you mean 'loraplex'?"),
        (details(), ENTRY, "other", "the cluster has no service other"),
        (details() | {"applications": {}}, ENTRY, None, "the cluster has no Loraplex service"),
        (two_services(), ENTRY, None, "name one by --application: loraplex, second"),
        (by_serve_run(), ENTRY, None, "loraplex was deployed by serve.run, not from a Serve file"),
        (untold(), ENTRY, None, "Serve does not say how other is deployed"),
    ],
)
def test_what_cannot_be_added_is_refused(
    cluster: dict[str, Any], entry: dict[str, Any], application: str | None, said: str
) -> None:
    with pytest.raises(CommandFailed) as caught:
        with_base(cluster, entry, application)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("cluster", "base_id", "said"),
    [
        (details(), "demo/sd51", "no base demo/sd51; did you mean 'demo/sd15'?; served are demo/sdxl, demo/sd15"),
        (details(), "demo/sdxl", "demo/sdxl is the base for requests that name none"),
        (details(default_base="demo/sd15"), "demo/sd15", "demo/sd15 is the base for requests that name none"),
        (details(bases=[base_settings("demo/sd15")]), "demo/sd15", "demo/sd15 is the only base"),
        (
            details(canaries=CANARIES),
            "demo/sd15",
            "would be deployed is not valid: applications.0.deployments: LoraplexIngress: user_config.canaries",
        ),
    ],
)
def test_what_cannot_be_removed_is_refused(cluster: dict[str, Any], base_id: str, said: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        without_base(cluster, base_id)
    assert said in str(caught.value)


def test_of_several_services_the_named_one_changes() -> None:
    change = with_base(two_services(), ENTRY, "second")
    assert (change.application, change.bases) == ("second", ("demo/sd15", "demo/third"))
    assert named(change.serve_file)["loraplex"] == details()["applications"]["loraplex"]["deployed_app_config"]


class Dashboard:
    """The address of Serve's REST API as Ray's dashboard has it, and what was deployed by it."""

    def __init__(self) -> None:
        self.deployed: list[dict[str, Any]] = []
        self.refusal = ""
        self.url = ""

    async def deploy(self, request: Request) -> Response:
        if self.refusal:
            return PlainTextResponse(self.refusal, 400)
        self.deployed.append(await request.json())
        return Response()

    @property
    def app(self) -> Starlette:
        path = "/api/serve/applications/"
        return Starlette(
            routes=[
                Route("/api/ray/version", lambda _: JSONResponse({"ray_version": "2.60.0"})),
                Route(path, lambda _: JSONResponse(details()), methods=["GET"]),
                Route(path, self.deploy, methods=["PUT"]),
            ]
        )


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    known = Dashboard()
    with served(known.app) as known.url:
        yield known


def test_a_base_is_deployed_and_the_whole_file_written(run: Run, dashboard: Dashboard, tmp_path: Path) -> None:
    base, whole = tmp_path / "base.yaml", tmp_path / "whole.yaml"
    base.write_text(yaml.safe_dump(ENTRY))
    result = run("bases", "add", base, "--write", whole, RAY_DASHBOARD_ADDRESS=dashboard.url)
    assert result.exit_code == 0, result.output
    assert dashboard.deployed == [with_base(details(), ENTRY).serve_file]
    assert yaml.safe_load(whole.read_text()) == dashboard.deployed[0]
    assert [one.id for one in check_serve_file(whole).applications[0].bases] == ["demo/sdxl", "demo/sd15", "demo/third"]
    assert whole.stat().st_mode & 0o777 == 0o600
    assert "demo/third: added; loraplex serves demo/sdxl, demo/sd15, demo/third" in result.output
    assert "loraplex bases status" in result.output

    assert "exists already" in run("bases", "remove", "demo/sd15", "--write", whole, "--address", dashboard.url).output
    told = run("bases", "remove", "demo/sd15", "--json", "--address", dashboard.url)
    assert json.loads(told.stdout) == {
        "removed": "demo/sd15", "application": "loraplex", "bases": ["demo/sdxl"], "written": None,
    }  # fmt: skip
    assert [set(named(file)) for file in dashboard.deployed[1:]] == [{"loraplex", "demo--sdxl", "other"}]


def test_a_refused_deployment_leaves_no_file(run: Run, dashboard: Dashboard, tmp_path: Path) -> None:
    dashboard.refusal = "Traceback (most recent call last):\nValueError: not now"
    whole = tmp_path / "whole.yaml"
    result = run("bases", "remove", "demo/sd15", "--write", whole, "--address", dashboard.url)
    assert result.exit_code == 1
    assert result.stderr == f"error: the cluster at {dashboard.url} refuses: ValueError: not now.\n"
    assert not whole.exists()


@pytest.mark.parametrize("text", ["- {id: demo/third}", "a: [", "", "id: 2026-12-01", "{id: .nan}"])
def test_a_file_that_is_no_base_is_refused_in_a_line(run: Run, dashboard: Dashboard, tmp_path: Path, text: str) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(text)
    result = run("bases", "add", base, "--address", dashboard.url)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert not dashboard.deployed


def test_an_address_that_accepts_and_never_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(CommandFailed, match=f"^{url} accepts and has not answered within 0.01 s; --address names"):
            Cluster(url, timeout_s=0.01)


def test_an_address_without_a_cluster_is_refused(run: Run, url: str) -> None:
    assert "refuses" in run("bases", "remove", "demo/sd15", "--address", url).output, "it is no dashboard"
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        free = f"http://127.0.0.1:{held.getsockname()[1]}"
        assert f"no Ray cluster answers at {free}" in run("bases", "remove", "demo/sd15", "--address", free).output
