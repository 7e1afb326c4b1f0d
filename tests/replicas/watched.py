"""A sleeping replica whose queue can be held, and which tells afterwards what ran in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ray import serve

from serve_app.engine.worker.scheduling import Batch, QueuePolicy
from tests.replicas.sleeping import SleepingDevice, SleepingReplica, Sleeps


@dataclass(frozen=True)
class Pass:
    """One pass as it began: who ran, and who waited then, those who ran among them; tickets are in order of arrival."""

    at_s: float
    tickets: tuple[int, ...]
    waiting: tuple[int, ...]


class WatchedDevice(SleepingDevice):
    """Begins nothing while it is held, and keeps what production's queue chose."""

    def __init__(self, sleeps: Sleeps) -> None:
        # The thread that `super` starts asks at once.
        self._is_held = True
        self._history: list[Pass] = []
        super().__init__(sleeps)

    def hold(self, policy: QueuePolicy) -> None:
        """Begin a new history under another policy; nothing may be waiting or running."""
        with self._changed:
            assert not self._waiting
            assert not self._running
            self._sleeps = replace(self._sleeps, policy=policy)
            self._is_held, self._history = True, []

    def release(self) -> None:
        with self._changed:
            self._is_held = False
            self._changed.notify()

    def waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    def history(self) -> list[Pass]:
        with self._changed:
            return self._history

    def _next(self, now_s: float) -> Batch | None:
        batch = None if self._is_held else super()._next(now_s)
        if batch is not None:
            waiting = tuple(item.job_id for item in self._waiting)
            self._history.append(Pass(now_s, batch.tickets, waiting))
        return batch


class _WatchedReplica(SleepingReplica.func_or_class):
    def __init__(self, sleeps: Sleeps, folder: Path) -> None:
        super().__init__(sleeps, folder)
        self._device = WatchedDevice(sleeps)

    async def hold(self, policy: QueuePolicy) -> None:
        self._device.hold(policy)

    async def release(self) -> None:
        self._device.release()

    async def waiting(self) -> int:
        return self._device.waiting()

    async def history(self) -> list[Pass]:
        return self._device.history()


WatchedReplica = serve.deployment(_WatchedReplica)
