"""A replica that does what a test says, a service of it, and callers who leave it when a test says so.

Its passes can be held at a step for as long as the test likes, however fast the machine is; its device fails where a
prompt says so. All else is production's.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray import serve

from cluster.local_service import base_handle, delete_service, run_service
from serve_app.config import BaseModelConfig, Environment, SharedSettings
from serve_app.core import GenerationRequest
from serve_app.deployments.replica.replica import BaseModelReplica
from serve_app.engine.drawing.pipeline import PassOutcome
from serve_app.engine.worker.turns import next_claim
from tests.replicas.wrapped import HOLD, WrappedPipeline
from tests.service import Service, base_settings, connect, posted

LOOKS_EVERY_S = 0.02
PATIENCE_S = 120
# No hold is taken for a slow device: predictions learn from how long passes took.
NO_LIMIT_S = 36_000.0
APP, BASE = "controlled", "demo/sd15"
# Has no replica until it is asked for.
LATE = "demo/late"
# A replica's state can be asked for while fewer requests are with it. As many as it takes at once find room to wait
# until they are with it, or with the next.
MAX_ONGOING, MAX_QUEUED = 5, 8
# Longer than a step, the first one on a busy machine too: else a replica that draws is replaced.
STALL_AFTER_S = 20.0

HANGS, BREAKS_AFTER_PREVIEW = "the device hangs", "the device breaks after a preview"
IS_FULL, OVERFLOWS = "the device is full", "the numbers overflow"


class Controlled(WrappedPipeline):
    """A base's pipeline whose passes stand after each step while a file exists, and fail where a prompt says so.

    A file needs no slot of the replica: one that is full can be released. A pass nobody wants any more goes on. The
    device hangs once for each folder that is handed in: the next replica finds a mark and draws.
    """

    def __init__(self, pipeline: Any, folder: Path, note_progress: Callable[[], None]) -> None:
        super().__init__(pipeline)
        self._folder = folder
        self._note_progress = note_progress

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_step: Callable[[int, int], None],
        on_preview: Callable[..., None] | None,
        is_cancelled: Callable[[], bool],
        **more: Any,
    ) -> PassOutcome:
        import torch

        prompts = {request.prompt for request in requests}
        if IS_FULL in prompts:
            torch.empty(1 << 60, dtype=torch.uint8)
        if HANGS in prompts and not (mark := self._folder / HANGS).exists():
            mark.touch()
            threading.Event().wait()

        def held(step: int, steps: int) -> None:
            on_step(step, steps)
            while (self._folder / HOLD).exists() and not is_cancelled():
                self._note_progress()
                time.sleep(LOOKS_EVERY_S)

        def shown(*images: Any) -> None:
            assert on_preview
            on_preview(*images)
            if BREAKS_AFTER_PREVIEW in prompts:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        with ExitStack() as ends:
            if OVERFLOWS in prompts:
                ends.callback(self._pipeline.components["unet"].register_forward_hook(_overflowing).remove)
            return self._pipeline.generate(
                requests, on_step=held, on_preview=on_preview and shown, is_cancelled=is_cancelled, **more
            )


def _overflowing(unet: Any, given: Any, made: tuple[Any, ...]) -> tuple[Any, ...]:
    return (made[0] * float("inf"), *made[1:])


@serve.deployment
class ControlledReplica(BaseModelReplica.func_or_class):
    """`BaseModelReplica` on such a pipeline; its hold and its marks lie in the service's cache folder."""

    async def __init__(self, base: BaseModelConfig, shared: SharedSettings, environment: Environment) -> None:
        await super().__init__(base, shared, environment)
        self._worker._pipeline = Controlled(self._worker._pipeline, environment.cache_dir, self._note_progress)

    async def choose_any_turn(self, is_so: bool) -> None:
        """Give each step to any request by chance, or as production does."""
        from tests.any_turn import AnyTurn

        self._worker._queue._choose = AnyTurn(0) if is_so else next_claim

    def _note_progress(self) -> None:
        """Let no hold be taken for a device that hangs."""
        self._worker._last_progress_s = self._worker._clock()


class Device:
    """What the one controlled replica of a base says of itself, and the hold on all with this cache."""

    def __init__(self, base: str, app: str, cache_dir: Path) -> None:
        self._handle = base_handle(base, app)
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
        (self._cache_dir / HOLD).touch()
        try:
            yield
        finally:
            (self._cache_dir / HOLD).unlink()


@contextmanager
def controlled_service(port: int, cache_dir: Path) -> Iterator[tuple[Service, Device]]:
    """A service of its own, where each base has one replica that can be controlled and takes few requests; one base has
    none at first."""
    replica = base_settings(BASE)["replica"] | {
        "max_backlog_s": NO_LIMIT_S,
        "max_ongoing_requests": MAX_ONGOING,
        "max_queued_requests": MAX_QUEUED,
        "stall_timeout_s": STALL_AFTER_S,
        "health_check_period_s": 1.0,
    }
    config: dict[str, Any] = {
        "bases": [
            *(base_settings(base, replica=replica) for base in (BASE, "demo/sdxl")),
            base_settings(LATE, source={"embedded": BASE}, replica=replica, autoscaling={"min_replicas": 0}),
        ],
        "adapters": {"embedded": True, "hub": {"enabled": False}},
        "ingress": {"replicas": 1, "num_cpus": 0.1, "body_timeout_s": 5.0},
        "request_timeout_s": NO_LIMIT_S,
        "cache_dir": str(cache_dir),
    }
    run_service(config, name=APP, replica=ControlledReplica)
    service = Service(f"http://127.0.0.1:{port}/{APP}")
    # A new replica takes its time to start.
    service.http.timeout = 600
    try:
        yield service, Device(BASE, APP, cache_dir)
    finally:
        delete_service(APP)


@contextmanager
def caller(service: Service, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request and be there, without reading, until the end of the block."""
    with connect(service.url) as connection:
        connection.sendall(posted(urlsplit(service.url).path + path, body))
        yield connection
