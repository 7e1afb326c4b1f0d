"""A replica whose passes can be held at a step, a service of it, and callers who leave it when a test says so.

What is held takes as long as the test likes, however fast the machine is and whoever is kept waiting on it.
"""

from __future__ import annotations

import socket
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
from tests.replicas.wrapped import HOLD, WrappedPipeline
from tests.service import Service, base_settings, connect, posted

LOOKS_EVERY_S = 0.02
PATIENCE_S = 120
# No hold is taken for a slow device: predictions learn from how long passes took.
NO_LIMIT_S = 36_000.0


class Held(WrappedPipeline):
    """A base's pipeline whose passes stand after each step while a file exists; a pass nobody wants any more goes on.

    A file needs no slot of the replica: one that is full can be released.
    """

    def __init__(self, pipeline: Any, hold: Path) -> None:
        super().__init__(pipeline)
        self._hold = hold

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
            while self._hold.exists() and not is_cancelled():
                time.sleep(LOOKS_EVERY_S)

        return self._pipeline.generate(requests, on_step=held, is_cancelled=is_cancelled, **more)


@serve.deployment
class HeldReplica(BaseModelReplica.func_or_class):
    """`BaseModelReplica` whose passes can be held where their first step has been counted."""

    async def __init__(self, base: BaseModelConfig, config: AppConfig, environment: Environment, keeper: Any) -> None:
        await super().__init__(base, config, environment, keeper)
        self._worker._pipeline = Held(self._worker._pipeline, environment.cache_dir / HOLD)


class Device:
    """What the one replica of a base says of itself, and the hold on it where it is a held one with this cache."""

    def __init__(self, base: str, app: str, cache_dir: Path | None = None) -> None:
        self._handle = serve.get_deployment_handle(deployment_name(base), app)
        self._cache_dir = cache_dir

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
        assert self._cache_dir, "no held replica"
        (self._cache_dir / HOLD).touch()
        try:
            yield
        finally:
            (self._cache_dir / HOLD).unlink()


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
        yield Service(f"http://127.0.0.1:{port}/held"), Device(base, "held", cache_dir)
    finally:
        serve.delete("held")


@contextmanager
def caller(service: Service, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request and be there, without reading, until the end of the block."""
    with connect(service.url) as connection:
        connection.sendall(posted(urlsplit(service.url).path + path, body))
        yield connection
