"""The plain tensors that quantised parameters are made of.

Owns how packed weights are told from others. Must import neither diffusers nor the packages that pack: the manifest of
a base is read in processes that start without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_packed(parameter: Tensor) -> bool:
    """Say whether a parameter holds fewer bits than its values have."""
    return is_traceable_wrapper_subclass(parameter) or hasattr(parameter, "quant_state")


def is_quantised(component: nn.Module) -> bool:
    """Say whether some layer of a component is quantised."""
    return any(map(is_packed, component.parameters()))


def plain_tensors(component: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a component by name, those that are packed in pieces."""
    for name, tensor in (*component.named_parameters(), *component.named_buffers()):
        yield from _pieces(name, tensor.data)
        if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes' scales
            yield from _of_state(name, state)


def _pieces(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    wrapped: Any = tensor
    for part in wrapped.__tensor_flatten__()[0]:
        yield from _pieces(f"{name}.{part}", getattr(wrapped, part))


def _of_state(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    fields: Mapping[str, Any] = vars(state)
    for part, value in fields.items():
        if isinstance(value, Tensor):
            yield f"{name}.{part}", value
        elif part == "state2" and value is not None:
            yield from _of_state(f"{name}.{part}", value)
