"""How a repository of the tests' Hub misbehaves, and for which kinds of request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Kinds of request, as `count` and `Fault.kinds` name them.
INFO, TREE, FILE, CDN = "info", "tree", "file", "cdn"


@dataclass(frozen=True)
class ErrorDetail:
    """How a repository misbehaves: a status instead of the answer, a delay, a slow body, the whole file for a range, a
    body that ends too early or holds other bytes, a size that is not the file's. After `times` answers it behaves."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    ignores_range: bool = False
    cut_after_bytes: int | None = None
    alters_bytes: bool = False
    claimed_bytes: int | None = None
    times: int | None = None
    kinds: tuple[str, ...] = (INFO, TREE, FILE, CDN)
