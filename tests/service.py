"""A real service for tests: Ray, Serve and the embedded models in this process's own cluster, on loopback."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from cluster.ports import free_port
from cluster.processes import command_line
from serve_app.environment import launch_environment

BASES = ("demo/sdxl", "demo/sd15")
EMBEDDED = Path(__file__).parents[1] / "serve_app" / "demo" / "hub"
STYLES = ("sketch", "pixel-art", "sepia", "night", "inverted", "stripes")


def base_settings(base_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": base_id,
        "source": {"embedded": base_id},
        "defaults": {"steps": 12, "guidance_scale": 3.0, "width": 64, "height": 64},
        "limits": {"min_side": 32, "max_side": 128, "max_pixels": 16384, "max_steps": 50},
        "replica": {"num_cpus": 0.1, "torch_threads": 1, "max_queued_requests": 300, "warm_up_timeout_s": 60},
        **fields,
    }


@contextmanager
def ray_cluster(home: Path) -> Iterator[int]:
    """Start Ray and Serve; yield the HTTP port."""
    # Ray writes its token and its usage id below HOME; the tests' cluster is closed to other machines.
    before = dict(os.environ)
    os.environ.update(launch_environment() | {"HOME": str(home), "RAY_AUTH_MODE": "disabled"})
    from ray import serve

    from cluster.local_cluster import BUSY_MACHINE, shut_down

    os.environ.update(BUSY_MACHINE)

    port = free_port()
    try:
        _start_ray()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        shut_down()
        os.environ.clear()
        os.environ.update(before)


def _start_ray() -> None:
    """Start Ray; once more where the machine had no time for it, which Ray itself gives up on after 30 s."""
    import ray

    for is_last in (False, False, True):
        try:
            # GPUs that are counted alone: nothing that asks for none sees them.
            ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
            return
        except Exception as error:
            if is_last or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def processes_of(marker: str) -> list[psutil.Process]:
    """Return the processes of this very cluster whose command line has a marker, such as `app:deployment`."""
    ours = psutil.Process().children(recursive=True)
    return [process for process in ours if marker in command_line(process)]


def process_of(marker: str) -> psutil.Process:
    """Return the one process of this very cluster whose command line has a marker."""
    (found,) = processes_of(marker)
    return found


@dataclass
class Service:
    """A client's view of a running service."""

    url: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=300, trust_env=False)

    def ask(self, prompt: str, *, model: str = "", lora: str = "", **parameters: Any) -> httpx.Response:
        headers = {"accept": "image/png"} | ({"lora": lora} if lora else {})
        path = f"/models/{model}" if model else "/"
        return self.http.post(path, json={"inputs": prompt, "parameters": parameters}, headers=headers)

    def draw(self, prompt: str, *, model: str = "", lora: str = "", **parameters: Any) -> NDArray[np.uint8]:
        reply = self.ask(prompt, model=model, lora=lora, **parameters)
        assert reply.status_code == 200, reply.text
        return pixels_of(reply)


def connect(url: str) -> socket.socket:
    """Open a connection to whoever serves a URL."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 80), timeout=120)


def posted(path: str, body: dict[str, Any]) -> bytes:
    """Return a request as it is sent."""
    content = json.dumps(body).encode()
    kind = "host: 127.0.0.1\r\ncontent-type: application/json"
    return f"POST {path} HTTP/1.1\r\n{kind}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


def pixels_of(reply: httpx.Response) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(reply.content)).convert("RGB"))
