"""Libraries that found no room for their handles count as a shortage while memory is short, and not otherwise."""

from __future__ import annotations

import pytest

from serve_app.engine.weights.shortage import is_out_of_memory

NO_ROOM = [
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
]


@pytest.mark.parametrize("message", NO_ROOM)
def test_a_library_without_room_is_a_shortage_while_memory_is_short(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message), free_bytes=lambda: 20 << 20)
    assert not is_out_of_memory(RuntimeError(message), free_bytes=lambda: 20 << 30)
    assert not is_out_of_memory(RuntimeError(message), free_bytes=lambda: None)


def test_another_error_is_none_however_little_is_free() -> None:
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"), free_bytes=lambda: 0)
