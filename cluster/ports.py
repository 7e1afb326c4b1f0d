"""Ports for servers that bind them a while after they were chosen."""

from __future__ import annotations

import random
import socket

# Over Ray's own (10002 to 19999), and under those that the kernel gives to anyone who asks for any, or to connections.
RANGE = range(20_000, 32_000)


def free_port() -> int:
    """Return a port of the loopback interface that is free now and that no other process gets by chance.

    Raises:
        OSError: after a hundred tries none was free.
    """
    for port in random.SystemRandom().sample(RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {RANGE.start} to {RANGE.stop - 1} is free")
