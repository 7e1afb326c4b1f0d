"""A seal over the bytes of a file: any altered bit gives another one, at a fraction of the cost of reading them.

Owns the arithmetic. It tells damage (torn writes, bad disks, stray edits), not forgery: whoever can write the cache
could as well write a new seal.
"""

from __future__ import annotations

import hashlib

import numpy

CHUNK_BYTES = 1024**2
WORD_BYTES = 8
SEAL_BYTES = 32


class Seal:
    """Takes bytes in pieces of any size; the value does not depend on where they were cut.

    Each chunk of `CHUNK_BYTES` is added up in 64-bit words, which any single change shows in; the sums, in order,
    and the head are hashed, so that chunks cannot change places either.
    """

    def __init__(self, head: bytes) -> None:
        self._digest = hashlib.sha256(head)
        self._sum = 0
        self._length = 0  # in the chunk that is being added up
        self._rest = b""  # less than a word

    def add(self, piece: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(piece)
        if self._rest or len(view) % WORD_BYTES:  # pieces of odd length are few and small
            view = memoryview(self._rest + bytes(view))
            whole = len(view) - len(view) % WORD_BYTES
            self._rest = bytes(view[whole:])
            view = view[:whole]
        while view:
            part = view[: CHUNK_BYTES - self._length]
            self._sum += int(numpy.frombuffer(part, numpy.uint64).sum(dtype=numpy.uint64))
            self._length += len(part)
            view = view[len(part) :]
            if self._length == CHUNK_BYTES:
                self._close_chunk()

    def value(self) -> bytes:
        """Return the seal of what was taken, of `SEAL_BYTES` bytes; nothing can be added afterwards."""
        self.add(b"\0" * (-len(self._rest) % WORD_BYTES))
        self._close_chunk()
        return self._digest.digest()

    def _close_chunk(self) -> None:
        self._digest.update((self._sum % 2**64).to_bytes(WORD_BYTES, "little"))
        self._sum = self._length = 0
