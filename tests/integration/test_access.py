"""Keys and private adapters on a real service: its own application, beside the shared one."""

from __future__ import annotations

import io
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI, PermissionDeniedError
from PIL import Image

from cluster.local_service import delete_service, run_service
from serve_app.config import digest_of
from tests.access_matrix import KEYED, LISTED, MATRIX, NAMED, NOTHING, OPEN, request_of
from tests.faults.breaking import until
from tests.held_streams import LET_IN, HeldStreams
from tests.hub_server import ErrorDetail, HubServer
from tests.service import base_settings, process_of
from tests.written_files import contents, logs

USER, ADMIN, WRONG, LIMITED = "lpx_user", "lpx_admin", "lpx_wrong", "lpx_limited"
ALICE, BOB, CAROL = "hf_alice", "hf_bob", "hf_carol"
# As long as real ones, so that they are known for what they are wherever a caller puts them.
PLANTED_TOKEN, PLANTED_KEY = "hf_" + "PlantedTokenOfACaller0123456789ab", "lpx_" + "PlantedKeyOfNobody" * 2
PRIVATE = "acme/private-night"
EMBEDDED = Path(__file__).parents[2] / "serve_app" / "demo" / "hub" / "demo"
ACCESS_TTL_S = 0.5
# Less than what is remembered by default, and enough for an answer that a busy machine gives late.
FORGOTTEN_S = 30.0
WAIT_S = 60.0
IN_A_ROW = 12
QUICK = {"num_inference_steps": 1, "seed": 1}
AT_ONCE, LIMITED_OUT = 2, "key_limit_reached"
# What an ingress replica logs of the limited key's requests.
ASKED = b"with key few"
# A stream that is under way for as long as its reader stays.
ENDLESS = {
    "prompt": "a cat",
    "model": "demo/sd15",
    "stream": True,
    "num_inference_steps": 1000,
    "n": 4,
    "size": "128x128",
}
# On a busy machine it looks as if it took hours, which is not to be why it is refused.
HOURS_S = 36_000.0


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


def logged(phrase: bytes) -> dict[Path, int]:
    """How often each ingress replica that has ever logged a phrase has done so."""
    counts = {path: content.count(phrase) for path, content in logs("*guarded_LoraplexIngress*").items()}
    return {path: count for path, count in counts.items() if count}


@pytest.fixture(scope="module")
def guarded(cluster: int, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    hub.push_folder(PRIVATE, EMBEDDED / "sd15-night")
    hub.hide(PRIVATE, tokens=frozenset({ALICE, CAROL}))
    cache = tmp_path_factory.mktemp("guarded")
    config: dict[str, Any] = {
        "bases": [
            base_settings(
                "demo/sd15",
                limits={"min_side": 32, "max_side": 128, "max_steps": 1000},
                replica={"num_cpus": 0.1, "torch_threads": 1, "max_backlog_s": HOURS_S},
            )
        ],
        "adapters": {
            "embedded": True,
            "hub": {
                "endpoint": hub.endpoint,
                "timeout_s": 60.0,
                "forward_tokens": True,
                "access_ttl_s": ACCESS_TTL_S,
            },
        },
        "ingress": {"replicas": 2, "num_cpus": 0.1},
        "request_timeout_s": HOURS_S,
        "auth": {
            "keys": [
                {"name": "alice", "sha256": digest_of(USER)},
                {"name": "root", "sha256": digest_of(ADMIN), "admin": True},
                {"name": "few", "sha256": digest_of(LIMITED), "limits": {"concurrency": AT_ONCE}},
            ]
        },
        "cache_dir": str(cache),
    }
    run_service(config, name="guarded")
    with httpx.Client(timeout=240, trust_env=False) as http:
        made = Guarded(f"http://127.0.0.1:{cluster}/guarded", cache, http)
        # An ingress that has not heard of the replica yet, and to which that is late to answer, would know nobody.
        everywhere(lambda: states(made) == ["RUNNING"])
        yield made
    delete_service("guarded")


def states(guarded: Guarded) -> list[str]:
    return [row["state"] for row in guarded.ask("GET", "/v1/replicas", USER).json()["data"]]


def everywhere(is_so: Callable[[], bool], *, patience_s: float = WAIT_S) -> None:
    """Ask until both ingress replicas say yes, as far as a dozen answers in a row can tell."""
    ends_at, in_a_row = time.monotonic() + patience_s, 0
    while in_a_row < IN_A_ROW:
        in_a_row = in_a_row + 1 if is_so() else 0
        assert time.monotonic() < ends_at or in_a_row


def asked(
    guarded: Guarded, route: tuple[str, str], adapter: str, model: str, key: str | None, token: str | None
) -> Any:
    """Send a request to a route that names an adapter and a model where it can."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    url, more = request_of(*route, adapter=adapter, model=model, image=picture.getvalue())
    return guarded.ask(route[0], url, key, token, **more)


def remove_alias(guarded: Guarded, name: str) -> None:
    """Remove an alias that was just made: an ingress may not have heard of it yet."""
    until(lambda: guarded.ask("DELETE", f"/v1/loras/{name}", ADMIN).json().get("deleted") is True, "the removal")


# The routes of the application itself are checked against the matrix in tests/unit/api/http/test_auth.py.
@pytest.mark.parametrize("key", [None, WRONG, USER, ADMIN])
def test_every_route_lets_in_whom_it_should(guarded: Guarded, key: str | None) -> None:
    wrong: list[str] = []
    for route, rule in MATRIX.items():
        status = asked(guarded, route, "demo/sd15-sepia", "demo/sd15", key, None).status_code
        may = rule.needs == OPEN or key == ADMIN or (rule.needs == KEYED and key == USER)
        expected = 404 if "static" in route[1] else 200
        if status != (expected if may else 403 if key == USER else 401):
            wrong.append(f"{route}: {status}")
    if key == ADMIN:
        remove_alias(guarded, "of-the-matrix")
    assert wrong == []


@pytest.mark.parametrize("token", [ALICE, BOB, None])
def test_no_route_gives_a_private_adapter_away(guarded: Guarded, token: str | None) -> None:
    assert guarded.draw(PRIVATE, ALICE).status_code == 200, "by now it lies in memory"
    wrong: list[str] = []
    for route, rule in MATRIX.items():
        if rule.private == NOTHING:
            continue
        reply = asked(guarded, route, PRIVATE, PRIVATE, ADMIN, token)
        if rule.private == NAMED and reply.status_code != (200 if token == ALICE else 404):
            wrong.append(f"{route}: {reply.status_code} {reply.text[:200]}")
        if rule.private == LISTED and token != ALICE and f'"{PRIVATE}"' in reply.text:
            wrong.append(f"{route} shows it")
    if token == ALICE:
        remove_alias(guarded, "of-the-matrix")
    assert wrong == []


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
    everywhere(lambda: guarded.draw(PRIVATE, CAROL).status_code == 404, patience_s=FORGOTTEN_S)
    assert guarded.draw(PRIVATE, ALICE).status_code == 200


def test_an_alias_of_a_private_adapter_opens_it_to_nobody_else(guarded: Guarded) -> None:
    body = {"lora_name": "dusk", "source": {"uri": PRIVATE}, "preload": True}
    assert guarded.ask("POST", "/v1/loras", ADMIN, BOB, json=body).status_code == 404
    reply = guarded.ask("POST", "/v1/loras", ADMIN, ALICE, json=body)
    assert reply.status_code == 200, reply.text
    everywhere(lambda: guarded.draw("dusk", ALICE).status_code == 200)
    for token in (BOB, None):
        assert guarded.draw("dusk", token).status_code == 404
        assert PRIVATE not in guarded.ask("GET", "/v1/loras", USER, token).text
        assert PRIVATE not in guarded.ask("GET", "/v1/models", USER, token).text
    assert PRIVATE in guarded.ask("GET", "/v1/loras", USER, ALICE).text
    assert guarded.ask("DELETE", "/v1/loras/dusk", ADMIN).json()["deleted"] is True


def failures(guarded: Guarded, hub: HubServer) -> Iterator[tuple[str, Any]]:
    """Requests that fail, each in a way of its own, with a key and a token of the caller in every place there is."""

    def post(path: str, key: str = USER, headers: dict[str, str] | None = None, **more: Any) -> Any:
        headers = {"authorization": f"Bearer {key}", "x-hf-token": PLANTED_TOKEN} | (headers or {})
        return guarded.http.post(guarded.url + path, headers=headers, **more)

    body = {"inputs": "a cat", "parameters": QUICK}
    yield "an unknown key", guarded.ask("GET", "/v1/models", PLANTED_KEY)
    yield "a key as its name", guarded.ask("GET", f"/v1/models/{PLANTED_KEY}", USER)
    yield "a token without access", guarded.draw(PRIVATE, PLANTED_TOKEN)
    yield "two tokens in one header", guarded.draw(PRIVATE, f"{PLANTED_TOKEN} {PLANTED_TOKEN}")
    yield "credentials in the path", post(f"/models/{PLANTED_TOKEN}/{PLANTED_KEY}", json=body)
    yield "credentials in the query", post(f"/?token={PLANTED_TOKEN}&key={PLANTED_KEY}", content=b"no JSON")
    yield "credentials in a header", post("/", headers={"lora": f"{PLANTED_TOKEN}/{PLANTED_KEY}"}, json=body)
    yield "a token as the request's id", post("/", headers={"x-request-id": PLANTED_TOKEN}, content=b"{")
    yield "broken JSON that holds them", post("/", content=f'{{"inputs": "{PLANTED_TOKEN} {PLANTED_KEY}"'.encode())
    yield "a field called so", post("/", json={**body, PLANTED_TOKEN: PLANTED_KEY})
    yield "a head that is too large", post("/", headers={"x-a": PLANTED_TOKEN * 2000}, json=body)
    yield "no time at all", post("/", headers={"x-request-timeout-s": "0.0001"}, json=body)
    yield (
        "an alias that may not be made",
        post("/v1/loras", json={"lora_name": PLANTED_KEY, "source": {"uri": PRIVATE}}),
    )
    hub.push("acme/planted-pickle", {"adapter.bin": b"\x80\x04", "README.md": b"---\n---\n"})
    hub.hide("acme/planted-pickle", tokens=frozenset({PLANTED_TOKEN}))
    yield "a file that is refused", guarded.draw("acme/planted-pickle", PLANTED_TOKEN)
    hub.push_folder("acme/planted-broken", EMBEDDED / "sd15-night")
    hub.hide("acme/planted-broken", tokens=frozenset({PLANTED_TOKEN}))
    hub.fail("acme/planted-broken", ErrorDetail(status=500))
    yield "a Hub that fails", guarded.draw("acme/planted-broken", PLANTED_TOKEN)


def test_nothing_that_is_kept_or_logged_holds_a_key_or_a_token(guarded: Guarded, hub: HubServer) -> None:
    assert guarded.draw(PRIVATE, ALICE).status_code == 200
    assert guarded.ask("GET", "/v1/models", WRONG).status_code == 401
    planted = (PLANTED_TOKEN, PLANTED_KEY)
    for name, reply in failures(guarded, hub):
        assert 400 <= reply.status_code < 600, name
        # Serve's proxy repeats the id that it was given.
        said = reply.text + str([header for header in reply.headers.items() if header[0] != "x-request-id"])
        assert [secret for secret in planted if secret in said] == [], name
    secrets = [secret.encode() for secret in (USER, ADMIN, WRONG, ALICE, BOB, CAROL, *planted)]
    read = logs() | contents(guarded.cache)
    assert any(b"with key alice" in content for content in read.values())
    assert [path.name for path, content in read.items() if any(secret in content for secret in secrets)] == []


@pytest.mark.slow
def test_a_replica_that_dies_with_a_caller_s_token_in_hand_leaves_it_nowhere(guarded: Guarded, hub: HubServer) -> None:
    hub.push_folder("acme/planted", EMBEDDED / "sd15-night")
    hub.hide("acme/planted", tokens=frozenset({PLANTED_TOKEN}))
    body = ENDLESS | {"model": "acme/planted"}
    headers = {"authorization": f"Bearer {USER}", "x-hf-token": PLANTED_TOKEN}
    url = f"{guarded.url}/v1/images/generations"
    with guarded.http.stream("POST", url, json=body, headers=headers) as reply:
        assert reply.status_code == 200, reply.read()
        said: list[str] = []
        steps = steps_in(reply, said)
        reached = next(step for step in steps if step > 1)  # the replica has it in hand
        process_of("guarded-demo--sd15:").send_signal(signal.SIGABRT)
        told = pairwise(chain([reached], steps))
        assert any(later < earlier for earlier, later in told), "it begins again at the next replica"
    assert PLANTED_TOKEN not in "".join(said)
    everywhere(lambda: guarded.draw("demo/sd15", None).status_code == 200)
    assert [path.name for path, content in logs().items() if PLANTED_TOKEN.encode() in content] == []


def steps_in(reply: httpx.Response, said: list[str]) -> Iterator[int]:
    """Yield the steps that a stream tells of; everything that it says goes into `said`."""
    for line in reply.iter_lines():
        said.append(line)
        if found := re.search(r'"step": ?(\d+)', line):
            yield int(found[1])


def limited_streams(guarded: Guarded, count: int) -> HeldStreams:
    return HeldStreams(f"{guarded.url}/v1/images/generations", LIMITED, ENDLESS, count)


def until_let_in(guarded: Guarded) -> None:
    """Ask with the limited key until it may."""
    ends_at = time.monotonic() + WAIT_S
    while (status := guarded.draw("demo/sd15", None, LIMITED).status_code) != 200:
        assert (status, time.monotonic() < ends_at) == (429, True)


def had_requests(before: dict[Path, int]) -> int:
    """How many ingress replicas have had requests of the limited key since."""
    return sum(count > before.get(path, 0) for path, count in logged(ASKED).items())


def test_each_ingress_replica_grants_its_share_of_a_key_s_limit_and_streams_hold_it_to_their_end(
    guarded: Guarded,
) -> None:
    until_let_in(guarded)
    asked = logged(ASKED)
    with limited_streams(guarded, 20) as endings:
        let_in, replicas = endings.count(LET_IN), had_requests(asked)
        assert let_in == replicas * max(1, AT_ONCE // 2)
        assert set(endings) == {LET_IN, LIMITED_OUT}
    until_let_in(guarded)


def test_a_replica_that_hangs_shows_as_silent_and_does_not_hold_up_the_list(guarded: Guarded) -> None:
    everywhere(lambda: states(guarded) == ["RUNNING"])
    process = process_of("guarded-demo--sd15:")
    process.suspend()
    try:
        # What was remembered from just before is shown for a second. As the replica hangs to the end, that there are
        # answers at all shows that none waits for it.
        ends_at = time.monotonic() + WAIT_S
        while states(guarded) != ["SILENT"]:
            assert time.monotonic() < ends_at
        assert guarded.ask("GET", "/v1/loras", USER).status_code == 200
    finally:
        process.resume()
    assert guarded.draw("demo/sd15-night", None).status_code == 200
