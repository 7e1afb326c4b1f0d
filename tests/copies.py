"""Copies of a live pipeline, several times faster than `copy.deepcopy` makes them."""

from __future__ import annotations

import io
import pickle
from typing import Any

from torch import Tensor, nn


class Original:
    """A pipeline whose objects are pickled once; its tensors are not, and are cloned for each copy."""

    def __init__(self, pipeline: Any) -> None:
        file = io.BytesIO()
        pickler = _WithoutTensors(file)
        pickler.dump(pipeline)
        self._pickled, self._tensors = file.getvalue(), [tensor for _, tensor in pickler.tensors.values()]

    def copy(self) -> Any:
        """Return a pipeline that shares nothing with the original."""
        reader = _WithTensors(io.BytesIO(self._pickled))
        reader.tensors = [_clone(tensor) for tensor in self._tensors]
        return reader.load()


class _WithoutTensors(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        return self.tensors.setdefault(id(obj), (len(self.tensors), obj))[0]


class _WithTensors(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, pid: Any) -> Tensor:
        return self.tensors[pid]


def _clone(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
