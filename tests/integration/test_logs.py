"""One request's id in the lines of every part that has it in its hands, and what a failing request's line says."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import ray

from tests.hub_server import HubServer
from tests.service import EMBEDDED, Service

PROMPT = "a violet hexagon that is nobody's business"
WAIT_S = 120.0

# Of the first test this is also the time in which cluster and service start.
pytestmark = pytest.mark.timeout(1200)


def lines_of(request_id: str, *, until: Callable[[list[str]], bool]) -> list[str]:
    """Return the lines that name a request, in the logs of ingress and base replicas; they are written in blocks."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    deadline = time.monotonic() + WAIT_S
    while True:
        files = folder.glob("replica_loraplex*.log")
        texts = [path.read_text("utf-8", "replace") for path in files]
        found = [line for text in texts for line in text.splitlines() if request_id in line]
        if until(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def saying(lines: list[str], part: str, sentence: str) -> list[str]:
    return [line for line in lines if f" {part} " in line and re.search(sentence, line)]


def test_one_id_is_in_the_lines_of_ingress_router_admission_replica_and_device_thread(
    service: Service, hub: HubServer
) -> None:
    adapter = f"acme/{uuid.uuid4().hex}"
    hub.push_folder(adapter, EMBEDDED / "demo" / "sd15-night")
    request_id = f"told-{uuid.uuid4().hex}"
    reply = service.http.post(f"/models/{adapter}", json={"inputs": PROMPT}, headers={"x-request-id": request_id})
    assert reply.status_code == 200, reply.text

    wanted = {
        "ingress": ("loraplex_LoraplexIngress", r"POST .* 200"),
        "router": ("loraplex_LoraplexIngress", r"for demo/sd15 goes to replica"),
        "admission": ("loraplex-demo--sd15_base-demo--sd15", f"{adapter}@.* was admitted"),
        "device thread": ("loraplex-demo--sd15_base-demo--sd15", r"begins on the device"),
        "replica": ("loraplex-demo--sd15_base-demo--sd15", r"denoise [0-9.]+ ms"),
    }

    def missing(lines: list[str]) -> list[str]:
        return [part for part, (where, sentence) in wanted.items() if not saying(lines, where, sentence)]

    lines = lines_of(request_id, until=lambda lines: not missing(lines))
    assert missing(lines) == [], lines
    assert not any("hexagon" in line for line in lines)


def test_a_failing_request_s_line_names_code_base_and_adapters_and_not_the_prompt_or_a_token(service: Service) -> None:
    request_id, token = f"failing-{uuid.uuid4().hex}", "hf_" + "a" * 30
    reply = httpx.post(
        f"{service.url}/models/demo/sd15-night",
        json={"inputs": PROMPT, "parameters": {"num_inference_steps": 10_000}},
        headers={"x-request-id": request_id, "authorization": f"Bearer {token}"},
        timeout=60,
        trust_env=False,
    )
    assert reply.status_code == 400
    sentence = r"with key none failed: .* \(out_of_bounds\); base demo/sd15, adapters demo/sd15-night$"
    lines = lines_of(request_id, until=lambda lines: bool(saying(lines, "loraplex_LoraplexIngress", sentence)))
    assert saying(lines, "loraplex_LoraplexIngress", sentence), lines
    assert not any("hexagon" in line or token in line for line in lines)
