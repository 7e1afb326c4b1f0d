"""One encoding of each distinct text of a pass, each alone.

Owns what a text encoder does with a batch. A text that is encoded beside others may come out with other bits than
alone; so each is encoded by itself, once, and what a request gets does not depend on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def encode_individually(encoders: Sequence[nn.Module]) -> Iterator[None]:
    """Have text encoders take the rows of a batch one by one, and equal rows once; for one pass of one thread."""
    for encoder in encoders:
        encoder.forward = _RowByRow(encoder.forward)
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward  # the class's own shows again


def text_encoders_of(pipeline: Any) -> tuple[nn.Module, ...]:
    """Return a pipeline's text encoders, each once, in its order."""
    parts: dict[str, Any] = pipeline.components
    found = [part for name, part in parts.items() if name.startswith("text_encoder") and isinstance(part, nn.Module)]
    return tuple(dict.fromkeys(found))


class _RowByRow:
    """The forward of a text encoder of transformers: token ids [batch, length] -> an output with a row for each."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        if len(input_ids) == 1:
            return self._forward(input_ids, attention_mask=attention_mask, **options)
        masks = [None] * len(input_ids) if attention_mask is None else list(attention_mask.split(1))
        keys = _keys(input_ids, attention_mask)
        places = {key: place for place, key in reversed(list(enumerate(keys)))}  # the first of each kind
        chosen = sorted(places.values())
        ids = input_ids.split(1)
        outputs = [self._forward(ids[place], attention_mask=masks[place], **options) for place in chosen]
        order = torch.tensor([chosen.index(places[key]) for key in keys], device=input_ids.device)
        return type(outputs[0])(**{name: _rows([output[name] for output in outputs], order) for name in outputs[0]})


def _keys(input_ids: Tensor, attention_mask: Tensor | None) -> list[bytes]:
    """Return what tells the rows of a batch apart; waits for a device, once for each encoder."""
    told = input_ids if attention_mask is None else torch.cat([input_ids, attention_mask.to(input_ids.dtype)], dim=1)
    return [row.tobytes() for row in told.cpu().numpy()]


def _rows(values: Sequence[Any], order: Tensor) -> Any:
    """Put one field of several outputs together, a row for each of `order`; some fields hold a tensor per layer."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values)).index_select(0, order)
    if isinstance(values[0], tuple):
        return tuple(_rows(layer, order) for layer in zip(*values, strict=True))
    return values[0]
