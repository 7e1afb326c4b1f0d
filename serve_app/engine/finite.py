"""Whether a change stays finite in its layer's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from serve_app.engine.adapter import Delta, Dense, Dora, Hadamard, Kronecker, LowRank, dtype_named, tensors_of
from serve_app.engine.fitting import Place
from serve_app.refusals import NonFinite

# A fused weight must stay in range at the largest scale a request may ask for, and with other adapters beside it.
HEADROOM = 64.0
# No training gives weights of this size: it is a broken alpha, and would overflow in the activations.
MAX_CHANGE = 1e6


def check_finite(delta: Delta, place: Place) -> None:
    """Refuse NaN and infinity in a change's tensors, and products that leave the range of the layer's dtype.

    The product is bounded from its factors; only where that bound is too high is it computed.
    """
    peaks = {id(tensor): _peak(tensor) for tensor in tensors_of(delta)}
    if not all(peak < float("inf") for peak in peaks.values()):  # false for NaN too
        raise NonFinite(place.adapter, f"{place.label} has NaN or infinite values")
    limit = min(torch.finfo(dtype_named(place.layer.dtype)).max / HEADROOM, MAX_CHANGE)
    change = delta.direction if isinstance(delta, Dora) else delta
    factor = 1.0 if isinstance(change, Dense) else max(1.0, abs(change.alpha / change.divisor))
    bound = _bound(change, lambda tensor: peaks[id(tensor)])
    if bound * factor >= limit and not _exact_peak(change) * factor < limit:
        raise NonFinite(place.adapter, f"{place.label} overflows in {place.layer.dtype}")


def _peak(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).item()


def _bound(delta: LowRank | Hadamard | Kronecker | Dense, peak: Callable[[Tensor], float]) -> float:
    match delta:
        case LowRank():
            bias = 0.0 if delta.bias is None else peak(delta.bias)
            return max(bias, delta.rank * peak(delta.down) * peak(delta.up))
        case Hadamard():
            rank = delta.up_1.shape[1] * delta.up_2.shape[1]
            return rank * peak(delta.up_1) * peak(delta.down_1) * peak(delta.up_2) * peak(delta.down_2)
        case Kronecker():
            return peak(delta.left) * peak(delta.right)
        case Dense():
            return max(peak(tensor) for tensor in tensors_of(delta))


def _exact_peak(delta: LowRank | Hadamard | Kronecker | Dense) -> float:
    match delta:
        case LowRank():
            bias = 0.0 if delta.bias is None else _peak(delta.bias)
            return max(bias, _peak(delta.up.flatten(1).double() @ delta.down.flatten(1).double()))
        case Hadamard():
            first = delta.up_1.double() @ delta.down_1.double()
            return _peak(first * (delta.up_2.double() @ delta.down_2.double()))
        case Kronecker():
            return _peak(delta.left) * _peak(delta.right)
        case Dense():
            return max(_peak(tensor) for tensor in tensors_of(delta))
