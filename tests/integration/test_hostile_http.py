"""The hostile corpus against the real service: each request gets a 4xx of the contract's shape, and nothing leaks."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hostile_http import CORPUS, SECRETS, HostileRequest, message
from tests.hub_server import HubServer
from tests.replicas.controlled import Device
from tests.service import Service

PATIENCE_S = 60
CALLERS = 4
# What tells of the machine behind the service: its folders, its files, its code.
TELLTALES = re.compile(
    r"Traceback|site-packages|/tmp/|/home/|/root/|/usr/|serve_app|line [0-9]+, in|0x[0-9a-f]{6,}|ray::|pydantic"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, taken apart no further than a client must."""

    status: int
    headers: str
    body: str

    @classmethod
    def of(cls, raw: bytes) -> Reply:
        head, _, body = raw.partition(b"\r\n\r\n")
        line, _, headers = head.decode("latin-1").partition("\r\n")
        return cls(int(line.split()[1]), headers.lower(), body.decode("utf-8", "replace"))


def answer(service: Service, raw: bytes) -> Reply | None:
    """Send bytes and return the reply, None where the server hung up without one."""
    parts = urlsplit(service.url)
    chunks: list[bytes] = []
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=PATIENCE_S) as connection:
        # It may be refused before all is sent; what was said may still be there.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                chunks.append(chunk)
    return Reply.of(b"".join(chunks)) if chunks else None


def complaint(service: Service, request: HostileRequest) -> str | None:
    """Say what is wrong with the reply to a request, None where nothing is."""
    reply = answer(service, request.raw)
    if not request.is_http:
        return None if reply is None or 400 <= reply.status < 500 else f"{reply}"
    if reply is None:
        return "no reply"
    if not 400 <= reply.status < 500:
        return f"status {reply.status}: {reply.body[:300]}"
    if request.is_head:
        return None
    return complaint_of_body(request, reply)


def complaint_of_body(request: HostileRequest, reply: Reply) -> str | None:
    try:
        content = json.loads(reply.body)
    except ValueError:
        return f"no JSON: {reply.body[:300]!r}"
    fault = content["error"] if request.path.startswith("/v1") else content
    keys = {"message", "type", "param", "code"} if request.path.startswith("/v1") else {"error", "code"}
    if set(fault) != keys or not re.fullmatch("[a-z_]+", fault["code"]):
        return f"not the contract's: {content}"
    sentence = fault["message"] if "message" in fault else fault["error"]
    if not sentence or len(sentence) > 1000:
        return f"a sentence of {len(sentence)} characters"
    if "x-evil" in reply.headers:
        return "a header of the caller's making"
    told = TELLTALES.search(sentence)
    return f"it tells of {told[0]!r}: {sentence}" if told else None


@pytest.mark.parametrize("kind", CORPUS)
def test_hostile_requests_get_refusals_of_the_contract(service: Service, kind: str) -> None:
    requests = list(CORPUS[kind]())
    with ThreadPoolExecutor(CALLERS) as pool:
        complaints = list(pool.map(lambda request: complaint(service, request), requests))
    found = [f"{request.name}: {wrong}" for request, wrong in zip(requests, complaints, strict=True) if wrong]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_a_caller_who_sends_its_body_too_slowly_is_told_so(controlled: tuple[Service, Device]) -> None:
    service, _ = controlled
    head = message("POST", f"{urlsplit(service.url).path}/", length="1000").replace(
        b"connection: close", b"connection: keep-alive"
    )
    reply = answer(service, head + b'{"inputs": "ele')
    assert reply is not None
    assert (reply.status, json.loads(reply.body)["code"]) == (408, "body_timeout")
    assert "connection: close" in reply.headers


def test_a_body_without_end_is_cut_off_at_the_limit(service: Service) -> None:
    head = message("POST", "/").replace(b"content-length: 0", b"transfer-encoding: chunked")
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    reply = answer(service, head + chunk * 40)
    assert reply is None or (reply.status, json.loads(reply.body)["code"]) == (413, "too_large")


def test_nobody_fetches_what_a_request_names(service: Service, hub: HubServer) -> None:
    before = len(hub.requests)
    for name in (hub.endpoint, f"{hub.endpoint}/acme/sdxl-sepia", f"{hub.endpoint.removeprefix('http:')}/acme/x"):
        for body in ({"inputs": "a", "parameters": {"loras": [{"path": name}]}}, {"image": name, "inputs": "a"}):
            assert service.http.post("/", json=body).status_code in (400, 404, 422)
    assert len(hub.requests) == before


def test_the_logs_name_no_secret_of_callers_and_no_place_of_ours(service: Service, hub: HubServer) -> None:
    for kind in ("headers", "names"):
        for request in CORPUS[kind]():
            if any(secret.encode() in request.raw for secret in SECRETS):
                answer(service, request.raw)
    service.ask("a red circle", lora="acme/nowhere")
    lines = own_lines()
    assert any("acme/nowhere" in line for line in lines), "the log of these very requests should be there"
    assert [line for line in lines for secret in SECRETS if secret in line] == []
    # A caller may name our Hub's address itself; what we say of a lookup there must not.
    lookups = [line for line in lines if "acme/nowhere" in line]
    assert [line for line in lookups if urlsplit(hub.endpoint).netloc in line] == []


def own_lines() -> list[str]:
    """What Serve's processes have logged in our name so far; the lines of Ray itself tell where it runs."""
    from ray._private.worker import global_worker

    folder = Path(global_worker.node.get_session_dir_path()) / "logs" / "serve"  # type: ignore[union-attr]
    logs = [path for path in folder.glob("*.log") if path.name.startswith("replica_")]
    return [line for path in logs for line in path.read_text("utf-8", "replace").splitlines()]
