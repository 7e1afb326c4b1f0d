"""Which errors say that memory ran out, the device's or the host's.

Owns the signs. Must not know what was tried or what is done about it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import torch

_NO_MEMORY = (
    "out of memory",  # CUDA's caching allocator, and its driver for what lies outside of that
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# A library's handle or workspace found no room, where the device has next to none; else something is broken.
_NO_MEMORY_IF_SHORT = (
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "unable to find an engine",
)
# The size of a handle with its workspace, generously.
_SHORT_BYTES = 512 << 20


def free_device_bytes() -> int | None:
    """Return what the current GPU has left outside of torch; None without one, or where it does not answer."""
    if not torch.cuda.is_initialized():
        return None
    try:
        return torch.cuda.mem_get_info()[0]
    except RuntimeError:
        return None


def is_out_of_memory(error: BaseException, *, free_bytes: Callable[[], int | None] = free_device_bytes) -> bool:
    """Whether memory ran out, the device's or the host's: the operation failed, and the device works on."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    if any(sign in message for sign in _NO_MEMORY):
        return True
    if not any(sign in message for sign in _NO_MEMORY_IF_SHORT):
        return False
    free = free_bytes()
    return free is not None and free < _SHORT_BYTES
