"""A layer of a file -> the parts for each layer of the base that it stands for.

Owns what other implementations do otherwise than diffusers: query, key and value in one projection, shift and scale
the other way round, alpha multiplied into the factors. Must not know what a change computes beyond its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from serve_app.engine.adapters.target_layers import TargetLayer
from serve_app.refusals import UnsupportedMethod

Parts = dict[str, Tensor]
# The parts whose rows are the layer's outputs, and those that all parts of a fused projection share.
_BY_OUTPUT = frozenset(("up", "bias", "magnitude", "diff", "diff_b", "hada_w1_a", "hada_w2_a"))
_SHARED = frozenset(("down", "mid", "alpha", "hada_w1_b", "hada_w2_b"))


def split_projection(parts: Parts, targets: Sequence[TargetLayer], *, swaps_halves: bool) -> list[Parts]:
    """Return the parts for each place, in the order of the fused projection's outputs.

    Raises:
        ShapeMismatch: the projection has other outputs than the places together.
        UnsupportedMethod: the method's parts do not come apart by outputs.
    """
    sizes = [target.layer.shape[0] for target in targets]
    if len(sizes) == 1 and not swaps_halves:
        return [parts]
    split: list[Parts] = [{} for _ in targets]
    for part, tensor in _by_rows(parts, targets[0], sizes).items():
        is_per_input = part == "dora_scale" and len(sizes) == 1 and tensor.shape[:1] == (1,)
        if part in _SHARED or is_per_input:
            pieces: Sequence[Tensor] = [tensor] * len(sizes)
        else:
            if tensor.ndim < 1 or tensor.shape[0] != sum(sizes):
                raise targets[0].mismatch(
                    f"the file has {list(tensor.shape)} for the projection of {sum(sizes)} outputs that it is part of"
                )
            rows = torch.cat(tensor.chunk(2)[::-1]) if swaps_halves else tensor
            pieces = rows.split(sizes)
        for own, piece in zip(split, pieces, strict=True):
            own[part] = piece
    return _without_zero_blocks(split) if set(parts) <= {"down", "up", "alpha"} else split


def _by_rows(parts: Parts, target: TargetLayer, sizes: list[int]) -> Parts:
    """Return parts of which each is shared or has a row for each output."""
    scale = parts.get("dora_scale")
    if scale is not None and len(sizes) > 1 and scale.shape[:1] != (sum(sizes),):
        raise UnsupportedMethod(
            target.adapter,
            f"{target.label} is part of a projection with a magnitude per input, which cannot be divided: it is that "
            "of all outputs together, and in this base they are several layers",
        )
    if any(part.startswith("lokr_") for part in parts):
        return _kronecker_rows(parts, target)
    strange = sorted(set(parts) - _BY_OUTPUT - _SHARED - {"dora_scale"})
    if strange:
        raise UnsupportedMethod(
            target.adapter,
            f"{target.label} is part of a projection with a core ({strange[0]}), which cannot be divided",
        )
    return parts


def _kronecker_rows(parts: Parts, target: TargetLayer) -> Parts:
    """Multiply a Kronecker product out where its parts are divided: rows of one lie across the rows of others."""
    if "lokr_t2" in parts:
        raise UnsupportedMethod(
            target.adapter, f"{target.label} is part of a projection with a core (lokr_t2), which cannot be divided"
        )
    left, right = (_half(parts, half, target) for half in ("lokr_w1", "lokr_w2"))
    rank = next((parts[half].shape[0] for half in ("lokr_w2_b", "lokr_w1_b") if half in parts), None)
    product = torch.kron(left, right)
    alpha = parts.get("alpha")
    if alpha is not None and rank:
        product = product * (float(alpha.float().reshape(-1)[0]) / rank if alpha.numel() == 1 else float("nan"))
    # Parts that belong to no LoKr layer are kept, so that their reader refuses them.
    others = {part: tensor for part, tensor in parts.items() if part != "alpha" and not part.startswith("lokr_")}
    return {"diff": product} | others


def _half(parts: Parts, half: str, target: TargetLayer) -> Tensor:
    whole, up, down = (parts.get(key) for key in (half, f"{half}_a", f"{half}_b"))
    if whole is not None and up is None and down is None and whole.ndim == 2:
        return whole.float()
    if whole is not None or up is None or down is None or up.ndim != 2 or up.shape[1:] != down.shape[:1]:
        raise target.malformed("lacks a Kronecker factor, has one twice, or has one that is no matrix")
    return up.float() @ down.float()


def _without_zero_blocks(split: list[Parts]) -> list[Parts]:
    """Take trained parts apart again that sd-scripts put into one projection: each has a block of its own rank."""
    if len(split) < 2 or not all({"down", "up"} <= set(parts) for parts in split):
        return split
    down = split[0]["down"]
    rank, rest = divmod(down.shape[0], len(split)) if down.ndim == 2 else (0, 1)
    if rest or not rank or not all(parts["up"].shape[1:] == down.shape[:1] for parts in split):
        return split
    blocks = [slice(place * rank, (place + 1) * rank) for place in range(len(split))]
    for parts, block in zip(split, blocks, strict=True):
        up = parts["up"].float()
        if torch.count_nonzero(up) != torch.count_nonzero(up[:, block]):
            return split
    for parts, block in zip(split, blocks, strict=True):
        ratio = {} if "alpha" not in parts else {"alpha": parts["alpha"] / len(split)}
        parts |= {"down": down[block], "up": parts["up"][:, block].contiguous(), **ratio}
    return split


def fold_alpha(parts: Parts) -> Parts:
    """Multiply alpha into the factors in their own dtype, as diffusers does for transformers in kohya's names."""
    alpha, down = parts.get("alpha"), parts.get("down")
    if alpha is None or down is None or set(parts) != {"down", "up", "alpha"} or alpha.numel() != 1 or not len(down):
        return parts
    scale_down, scale_up = float(alpha.item()) / len(down), 1.0
    if not abs(scale_down) < float("inf"):
        return parts
    while 0 < scale_down * 2 < scale_up:
        scale_down *= 2
        scale_up /= 2
    return {"down": down * scale_down, "up": parts["up"] * scale_up}


def as_floats(parts: Mapping[str, Tensor]) -> Parts:
    """Return parts that can be computed with: eight-bit floats become 32-bit ones."""
    return {
        part: tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor
        for part, tensor in parts.items()
    }
