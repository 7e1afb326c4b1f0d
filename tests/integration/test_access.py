"""Keys and private adapters on a real service: its own application, beside the shared one."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI, PermissionDeniedError
from PIL import Image
from ray import serve

from serve_app.app import build
from serve_app.config import AppConfig, digest_of
from tests.hub_server import HubServer
from tests.service import base_settings, process_of

USER, ADMIN, WRONG = "lpx_user", "lpx_admin", "lpx_wrong"
ALICE, BOB, CAROL = "hf_alice", "hf_bob", "hf_carol"
PRIVATE = "acme/private-night"
EMBEDDED = Path(__file__).parents[2] / "serve_app" / "demo" / "hub" / "demo"
ACCESS_TTL_S = 0.5
QUICK = {"num_inference_steps": 1, "seed": 1}


@dataclass
class Guarded:
    """A service with keys, whose callers bring their own Hub tokens."""

    url: str
    cache: Path
    http: httpx.Client

    def ask(self, method: str, path: str, key: str | None = None, token: str | None = None, **more: Any) -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= {"x-hf-token": token} if token else {}
        return self.http.request(method, self.url + path, headers=headers, **more)

    def draw(self, model: str, token: str | None, key: str = USER) -> Any:
        return self.ask("POST", f"/models/{model}", key, token, json={"inputs": "a cat", "parameters": QUICK})


@pytest.fixture(scope="module")
def guarded(cluster: int, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    hub.push_folder(PRIVATE, EMBEDDED / "sd15-night")
    hub.hide(PRIVATE, tokens=frozenset({ALICE, CAROL}))
    cache = tmp_path_factory.mktemp("guarded")
    config = AppConfig.model_validate(
        {
            "bases": [base_settings("demo/sd15")],
            "adapters": {
                "embedded": True,
                "hub": {
                    "endpoint": hub.endpoint,
                    "timeout_s": 60.0,
                    "forward_tokens": True,
                    "access_ttl_s": ACCESS_TTL_S,
                },
            },
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "auth": {
                "keys": [
                    {"name": "alice", "sha256": digest_of(USER)},
                    {"name": "root", "sha256": digest_of(ADMIN), "admin": True},
                ]
            },
            "cache_dir": str(cache),
        }
    )
    serve.run(build(config), name="guarded", route_prefix="/guarded")
    with httpx.Client(timeout=120, trust_env=False) as http:
        yield Guarded(f"http://127.0.0.1:{cluster}/guarded", cache, http)
    serve.delete("guarded")


# The whole matrix is tests/unit/api/test_auth.py; this is that the service in front of it is wired to it.
@pytest.mark.parametrize(
    ("method", "path", "no_key", "user", "admin"),
    [
        ("GET", "/", 200, 200, 200),
        ("GET", "/health", 200, 200, 200),
        ("GET", "/v1/models", 401, 200, 200),
        ("GET", "/v1/replicas", 401, 200, 200),
        ("GET", "/openapi.json", 401, 200, 200),
        ("POST", "/v1/loras/demo/sd15-night/preload", 401, 403, 200),
        ("DELETE", "/v1/loras/demo/sd15-sepia", 401, 403, 200),
    ],
)
def test_routes_let_in_whom_they_should(
    guarded: Guarded, method: str, path: str, no_key: int, user: int, admin: int
) -> None:
    statuses = [guarded.ask(method, path, key).status_code for key in (None, WRONG, USER, ADMIN)]
    assert statuses == [no_key, no_key, user, admin]


def test_clients_of_openai_see_their_own_kinds_of_error(guarded: Guarded) -> None:
    def client(key: str) -> OpenAI:
        return OpenAI(base_url=f"{guarded.url}/v1", api_key=key, http_client=httpx.Client(trust_env=False))

    with client(WRONG) as stranger, pytest.raises(AuthenticationError):
        stranger.models.list()
    with client(USER) as user:
        assert [model.id for model in user.models.list()][0] == "demo/sd15"
        with pytest.raises(PermissionDeniedError):
            user.post("/loras", cast_to=object, body={"lora_name": "x", "source": {"uri": "demo/sd15-night"}})


def test_a_private_adapter_is_drawn_for_those_alone_who_may_read_it(guarded: Guarded) -> None:
    reply = guarded.draw(PRIVATE, ALICE)
    assert reply.status_code == 200, reply.text
    assert Image.open(io.BytesIO(reply.content)).size == (64, 64)
    assert reply.headers["x-adapters"].startswith(PRIVATE)
    # By now it lies in memory and on disk.
    for token in (BOB, None):
        refusal = guarded.draw(PRIVATE, token)
        assert (refusal.status_code, refusal.json()["code"]) == (404, "model_not_found")
    assert guarded.draw(PRIVATE, CAROL).status_code == 200


def test_a_private_adapter_is_refused_once_access_is_revoked(guarded: Guarded, hub: HubServer) -> None:
    assert guarded.draw(PRIVATE, CAROL).status_code == 200
    hub.revoke(PRIVATE, CAROL)
    revoked_at = time.monotonic()
    while guarded.draw(PRIVATE, CAROL).status_code == 200:
        assert time.monotonic() < revoked_at + ACCESS_TTL_S + 2
    assert guarded.draw(PRIVATE, CAROL).status_code == 404
    assert guarded.draw(PRIVATE, ALICE).status_code == 200


def test_an_alias_of_a_private_adapter_opens_it_to_nobody_else(guarded: Guarded) -> None:
    body = {"lora_name": "dusk", "source": {"uri": PRIVATE}, "preload": True}
    assert guarded.ask("POST", "/v1/loras", ADMIN, BOB, json=body).status_code == 404
    reply = guarded.ask("POST", "/v1/loras", ADMIN, ALICE, json=body)
    assert reply.status_code == 200, reply.text
    assert guarded.draw("dusk", ALICE).status_code == 200
    for token in (BOB, None):
        assert guarded.draw("dusk", token).status_code == 404
        assert PRIVATE not in guarded.ask("GET", "/v1/loras", USER, token).text
        assert PRIVATE not in guarded.ask("GET", "/v1/models", USER, token).text
    assert PRIVATE in guarded.ask("GET", "/v1/loras", USER, ALICE).text
    assert guarded.ask("DELETE", "/v1/loras/dusk", ADMIN).json()["deleted"] is True


def test_nothing_that_is_kept_or_logged_holds_a_key_or_a_token(guarded: Guarded) -> None:
    import ray

    assert guarded.draw(PRIVATE, ALICE).status_code == 200
    assert guarded.ask("GET", "/v1/models", WRONG).status_code == 401
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    secrets = [secret.encode() for secret in (USER, ADMIN, WRONG, ALICE, BOB, CAROL)]
    files = [path for folder in (logs, guarded.cache) for path in folder.rglob("*") if path.is_file()]
    read = {path: path.read_bytes() for path in files}
    assert any(b"with key alice" in content for content in read.values())
    assert [path.name for path, content in read.items() if any(secret in content for secret in secrets)] == []


def test_a_replica_that_hangs_shows_as_silent_and_delays_the_list_by_a_second_at_most(guarded: Guarded) -> None:
    guarded.ask("GET", "/v1/replicas", USER)
    process = process_of("guarded:base-demo--sd15")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        # What was remembered from just before is shown for a second.
        ends_at = time.monotonic() + 10
        while True:
            began = time.monotonic()
            (shown,) = guarded.ask("GET", "/v1/replicas", USER).json()["data"]
            took_s = time.monotonic() - began
            if shown["state"] == "SILENT" or time.monotonic() > ends_at:
                break
        assert shown["state"] == "SILENT"
        assert took_s < 2.5
        assert guarded.ask("GET", "/v1/loras", USER).status_code == 200
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert guarded.draw("demo/sd15-night", None).status_code == 200
