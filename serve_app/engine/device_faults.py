"""What an error of the device means: memory ran out, it is broken for good, or neither.

Owns the reading of torch's errors, whose types alone do not tell. Must not know what to do about them.
"""

from __future__ import annotations

import errno

import torch

_NO_MEMORY = (
    "out of memory",  # CUDA's caching allocator, and its driver for what lies outside of that
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# After each of these every further call on the device fails, until the process ends.
_BROKEN = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "context is destroyed",
    "busy or unavailable",
    "no CUDA-capable device",
    "CUDA error: unknown error",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the host's: what was begun failed, and the device works on."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def is_beyond_repair(error: BaseException) -> bool:
    """Whether the device will answer nothing more to this process."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _BROKEN)


def answers(device: torch.device) -> bool:
    """Whether a device still computes; a broken one fails at whatever it is asked."""
    try:
        return torch.ones(1, device=device).sum().item() == 1.0
    except RuntimeError as error:
        return is_out_of_memory(error)


def headline(error: BaseException) -> str:
    """Return what an error says in its first line; torch appends pages."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
