"""Changes of layers that are alike, stacked, so that one call of torch multiplies and one copy moves them.

Owns which changes are stacked, and the order and place of layers in a stack, which are those of their weights in a
slab too. Must not know files or live models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import Delta, LowRank, LowRankStack, SingleLayer, StackedLayers

# The bits of a product may depend on how its operands are aligned; this is how torch places tensors of their own.
ROW_ALIGNMENT_BYTES = 64


def stack_layers(components: Mapping[str, Mapping[str, Delta]]) -> StackedLayers:
    """Stack the changes of linear layers that are alike; copies their factors, unless they are stacked already."""
    if isinstance(components, StackedLayers):
        return components
    groups: dict[tuple[object, ...], list[str]] = {}
    singles: list[SingleLayer] = []
    for component, modules in components.items():
        for module, delta in modules.items():
            if isinstance(delta, LowRank) and delta.down.ndim == 2 and delta.bias is delta.shift is None:
                shapes = delta.down.shape, delta.up.shape
                alike = (component, *shapes, delta.down.dtype, delta.up.dtype, delta.down.device, delta.alpha,
                         delta.divisor)  # fmt: skip
                groups.setdefault(alike, []).append(module)
            else:
                singles.append((component, module, delta))
    stacks = [_stack(str(alike[0]), sorted(modules, key=layer_order), components) for alike, modules in groups.items()]
    return StackedLayers(tuple(components), stacks, singles)


def layer_order(module: str) -> tuple[list[str], list[int]]:
    """Return the place of a module in its stack: modules of one name lie together, across blocks.

    Trainers choose layers by the ends of their names, so that their choices lie in few pieces.
    """
    parts = module.split(".")
    return ["#" if part.isdigit() else part for part in reversed(parts)], [int(n) for n in re.findall(r"\d+", module)]


def empty_rows(count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return room for `count` matrices, [count, *shape], each where a tensor of its own might lie."""
    stride = row_stride(shape, dtype)
    memory = torch.empty(count * stride, dtype=dtype, device=device)
    return rows_of(memory, count, shape)


def rows_of(memory: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """Return the matrices in flat memory that holds them as `empty_rows` lays them out."""
    rows, columns = shape
    stride = row_stride(shape, memory.dtype)
    return memory.as_strided((count, rows, columns), (stride, columns, 1))


def memory_of(rows: Tensor) -> Tensor:
    """Return all memory of matrices that `empty_rows` laid out, flat."""
    return rows.as_strided((len(rows) * rows.stride(0),), (1,))


def row_stride(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return from one matrix to the next, in elements."""
    rows, columns = shape
    per_line = max(ROW_ALIGNMENT_BYTES // dtype.itemsize, 1)
    return -(-rows * columns // per_line) * per_line


def _stack(component: str, names: Sequence[str], components: Mapping[str, Mapping[str, Delta]]) -> LowRankStack:
    changes = [change for name in names if isinstance(change := components[component][name], LowRank)]
    downs, ups = (_stacked([getattr(change, part) for change in changes]) for part in ("down", "up"))
    return LowRankStack(component, tuple(names), downs, ups, changes[0].alpha, changes[0].divisor)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    memory = torch.zeros(len(tensors) * row_stride(first.shape, first.dtype), dtype=first.dtype, device=first.device)
    rows = rows_of(memory, len(tensors), first.shape)
    for row, tensor in zip(rows.unbind(), tensors, strict=True):
        row.copy_(tensor)
    return rows
