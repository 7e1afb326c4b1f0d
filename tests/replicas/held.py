"""A replica whose passes can be held at a step, a service of it, and callers who leave it when a test says so.

What is held takes as long as the test likes, however fast the machine is and whoever is kept waiting on it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray import serve

from serve_app.app import assemble
from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.core import GenerationRequest
from serve_app.deployments.ingress.ingress import deployment_name
from serve_app.deployments.replica.replica import BaseModelReplica
from serve_app.engine.drawing.pipeline import PassOutcome
from tests.replicas.wrapped import WrappedPipeline
from tests.service import Service, base_settings, connect, posted

LOOKS_EVERY_S = 0.02
PATIENCE_S = 120
# No hold is taken for a slow device: predictions learn from how long passes took.
NO_LIMIT_S = 36_000.0


class Gate:
    """Stands open until it is closed."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self.open()

    def close(self) -> None:
        self._is_open.clear()

    def open(self) -> None:
        self._is_open.set()

    def wait_until_open(self, *, unless: Callable[[], bool]) -> None:
        while not (self._is_open.wait(LOOKS_EVERY_S) or unless()):
            pass


class Held(WrappedPipeline):
    """A base's pipeline whose passes stop at a gate after each step; a pass that nobody wants any more goes on."""

    def __init__(self, pipeline: Any, gate: Gate) -> None:
        super().__init__(pipeline)
        self._gate = gate

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_step: Callable[[int, int], None],
        is_cancelled: Callable[[], bool],
        **more: Any,
    ) -> PassOutcome:
        def held(step: int, steps: int) -> None:
            on_step(step, steps)
            self._gate.wait_until_open(unless=is_cancelled)

        return self._pipeline.generate(requests, on_step=held, is_cancelled=is_cancelled, **more)


@serve.deployment
class HeldReplica(BaseModelReplica.func_or_class):
    """`BaseModelReplica` with a gate. While it is closed, a pass stands where its first step has been counted."""

    async def __init__(self, base: BaseModelConfig, config: AppConfig, environment: Environment, keeper: Any) -> None:
        await super().__init__(base, config, environment, keeper)
        self._gate = Gate()
        self._worker._pipeline = Held(self._worker._pipeline, self._gate)

    async def hold(self) -> None:
        self._gate.close()

    async def release(self) -> None:
        self._gate.open()


class Device:
    """What the one replica of a base says of itself, and the hold on it where it is a held one."""

    def __init__(self, base: str, app: str) -> None:
        self._handle = serve.get_deployment_handle(deployment_name(base), app)

    def state(self) -> Any:
        return self._handle.state.remote().result(timeout_s=PATIENCE_S)

    def wait_until(self, is_so: Callable[[Any], bool]) -> Any:
        """Ask again and again; return the state that answers."""
        ends_at = time.monotonic() + PATIENCE_S
        while not is_so(state := self.state()):
            assert time.monotonic() < ends_at, state
            time.sleep(LOOKS_EVERY_S)
        return state

    def wait_until_idle(self) -> Any:
        return self.wait_until(lambda state: state.waiting == state.running == state.work.pending_fetches == 0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold every pass at its next step, until the end of the block."""
        # A broadcast needs no slot: a replica that is full can be released.
        self._handle.broadcast("hold").results(timeout_s=PATIENCE_S)
        try:
            yield
        finally:
            self._handle.broadcast("release").results(timeout_s=PATIENCE_S)


@contextmanager
def held_service(port: int, base: str, cache_dir: Path, **replica: Any) -> Iterator[tuple[Service, Device]]:
    """A service of its own, with one replica that can be held and these settings."""
    settings = base_settings(base)
    config = AppConfig.model_validate(
        {
            "bases": [settings | {"replica": settings["replica"] | {"max_backlog_s": NO_LIMIT_S} | replica}],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 1, "num_cpus": 0.1, "request_timeout_s": NO_LIMIT_S},
            "cache_dir": str(cache_dir),
        }
    )
    serve.run(assemble(config, HeldReplica), name="held", route_prefix="/held")
    try:
        yield Service(f"http://127.0.0.1:{port}/held"), Device(base, "held")
    finally:
        serve.delete("held")


@contextmanager
def caller(service: Service, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request and be there, without reading, until the end of the block."""
    with connect(service.url) as connection:
        connection.sendall(posted(urlsplit(service.url).path + path, body))
        yield connection
