"""Breaking things on purpose: who runs what in this process's own cluster, and how to end or hold them.

Sees only descendants of this very process, so that no other cluster of the machine is harmed.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.processes import command_line

# Ray names a worker after the actor in it, and Serve a replica's actor after its application and deployment.
_REPLICA = re.compile(r"^ray::ServeReplica:(?P<app>[^:]+):(?P<deployment>[A-Za-z0-9_-]+)")
_PROXY = re.compile(r"^ray::ProxyActor\b")
_NODE = re.compile(r"--node[_-]id=(?P<id>[0-9a-f]{16,})")
WAIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the service."""

    pid: int
    node: str
    app: str
    deployment: str


def parts() -> list[Part]:
    """Return all replicas of all deployments that run now, those that still start among them."""
    return [Part(pid, node, m["app"], m["deployment"]) for pid, node, m in _workers(_REPLICA)]


def replica_pids(deployment_prefix: str, *, app: str | None = None) -> dict[int, str]:
    """Return the process ids of the replicas of deployments whose name begins so, each with its node's id; `app` is the
    service that they are of."""
    return {
        part.pid: part.node
        for part in parts()
        if part.deployment.startswith(deployment_prefix) and (app is None or f"{part.app}-".startswith(f"{app}-"))
    }


def proxy_pids() -> dict[int, str]:
    """Return the process ids of Serve's proxies, each with its node's id."""
    return {pid: node for pid, node, _ in _workers(_PROXY)}


def kill(pid: int) -> None:
    """End a process with SIGKILL; it may have ended already."""
    _signal(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """Hold a process: it keeps its sockets and answers nothing."""
    _signal(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    """Let a held process go on; it may have ended already."""
    _signal(pid, signal.SIGCONT)


@contextmanager
def held(pid: int) -> Iterator[None]:
    """Hold a process for as long as this lasts."""
    stop(pid)
    try:
        yield
    finally:
        resume(pid)


def is_alive(pid: int) -> bool:
    """Say whether a process runs, or is held; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def has_ended(pid: int) -> bool:
    """Say whether a process runs no more."""
    return not is_alive(pid)


def talking_to(port: int, pids: Iterable[int]) -> list[int]:
    """Return those processes that have a connection to a port of this machine open."""
    return [pid for pid in pids if any(c.raddr and c.raddr.port == port for c in _connections(pid))]


def until(is_so: Callable[[], bool], what: str, *, timeout_s: float = WAIT_S, poll_s: float = 0.05) -> float:
    """Return the seconds until a condition holds.

    Raises:
        AssertionError: it did not come to hold within `timeout_s`.
    """
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < timeout_s, f"{what} did not come to be within {timeout_s:g} s"
        time.sleep(poll_s)
    return time.monotonic() - began


def _workers(title: re.Pattern[str]) -> Iterator[tuple[int, str, re.Match[str]]]:
    for raylet in psutil.Process().children(recursive=True):
        node = _NODE.search(command_line(raylet)) if _name(raylet) == "raylet" else None
        if node is None:
            continue
        for worker in _children(raylet):
            if found := title.match(command_line(worker)):
                yield worker.pid, node["id"], found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []


def _connections(pid: int) -> list[Any]:
    try:
        return list(psutil.Process(pid).net_connections("tcp"))
    except psutil.Error:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
