"""A parsed adapter in a device's memory.

Owns the move: one copy of the whole adapter, where its tensors are views of one buffer.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.adapter import Delta, LowRank, ParsedAdapter, tensors_of


def on_device(adapter: ParsedAdapter, device: torch.device) -> ParsedAdapter:
    """Return the adapter with its tensors on `device`; `adapter` must come from one canonical file."""
    first = next(tensor for _, _, delta in adapter.layers() for tensor in tensors_of(delta))
    storage = first.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage)
    moved = whole.to(device, non_blocking=True, copy=True).untyped_storage()
    components = {
        component: {module: _moved(delta, moved) for module, delta in modules.items()}
        for component, modules in adapter.components.items()
    }
    return replace(adapter, components=components)


def _moved(delta: Delta, storage: torch.UntypedStorage) -> Any:
    changes: dict[str, Any] = {}
    for part in fields(delta):
        value = getattr(delta, part.name)
        if isinstance(value, Tensor):
            empty = torch.empty(0, dtype=value.dtype, device=storage.device)
            changes[part.name] = empty.set_(storage, value.storage_offset(), value.size(), value.stride())
        elif isinstance(value, LowRank):
            changes[part.name] = _moved(value, storage)
    return replace(delta, **changes)
