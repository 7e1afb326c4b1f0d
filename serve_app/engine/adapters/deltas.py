"""A parsed adapter: what it changes in each layer of a base, as tensors and numbers alone.

Owns the kinds of change (`Delta`) and `ParsedAdapter`. Must not know files, formats or live models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """W + s * (up @ down), with s = scale * alpha / divisor; the layer's bias gets s * bias + scale * shift.

    Linear: down [rank, in], up [out, rank]. Convolution: down [rank, in, kh, kw], up [out, rank, 1, 1].
    `divisor` is the rank, or its square root under rank stabilisation. Kept apart from `alpha` because peft
    multiplies the request's scale by alpha before it divides, and results must equal its own to the last bit.
    """

    down: Tensor
    up: Tensor
    alpha: float
    divisor: float
    bias: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner width."""
        return self.down.shape[0]

    def factor(self, scale: float) -> float:
        """Return the number that multiplies the product at a request's scale."""
        return scale * self.alpha / self.divisor


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """W + s * (up_1 @ down_1) * (up_2 @ down_2), elementwise (LoHa); s as in `LowRank`.

    up_n [out, rank], down_n [rank, in * kh * kw]; the product takes the layer's shape.
    """

    up_1: Tensor
    down_1: Tensor
    up_2: Tensor
    down_2: Tensor
    alpha: float
    divisor: float


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """W + s * kron(left, right), reshaped to the layer (LoKr); s as in `LowRank`.

    left [o1, i1], right [o2, i2] or [o2, i2, kh, kw], with o1 * o2 outputs and i1 * i2 inputs.
    """

    left: Tensor
    right: Tensor
    alpha: float
    divisor: float


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """W + scale * weight, in the shape of the layer or norm (a full difference); a bias alike."""

    weight: Tensor
    bias: Tensor | None = None

    def factor(self, scale: float) -> float:
        """Return the number that multiplies the difference at a request's scale."""
        return scale


Direction = LowRank | Hadamard | Kronecker | Dense


@dataclass(frozen=True, slots=True, eq=False)
class Dora:
    """magnitude * (W + d) / ||W + d||, d the change of `direction`.

    Norms and magnitudes are per output, [out], or, where `is_per_input`, per input channel, [in]. A request's scale
    multiplies d, as in peft, or, where `is_scaled_whole`, the difference from W, as in ComfyUI and A1111.
    """

    direction: Direction
    magnitude: Tensor
    is_per_input: bool = False
    is_scaled_whole: bool = False


Delta = LowRank | Dora | Hadamard | Kronecker | Dense


# One change by itself: component, module, change.
SingleLayer = tuple[str, str, Delta]


@dataclass(frozen=True, slots=True, eq=False)
class LowRankStack:
    """The changes of linear layers of one component, shape and rank, without biases: layer i has the i-th factors.

    downs [n, rank, in], ups [n, out, rank]; each matrix is contiguous and aligned as a tensor of its own would be.
    `alpha` and `divisor` are those of `LowRank`, the same for all.
    """

    component: str
    modules: tuple[str, ...]
    downs: Tensor
    ups: Tensor
    alpha: float
    divisor: float

    def factor(self, scale: float) -> float:
        """Return the number that multiplies the products at a request's scale."""
        return scale * self.alpha / self.divisor

    def layers(self) -> Iterator[tuple[str, LowRank]]:
        """Yield (module, change), as views."""
        for module, down, up in zip(self.modules, self.downs.unbind(), self.ups.unbind(), strict=True):
            yield module, LowRank(down, up, self.alpha, self.divisor)


class StackedLayers(Mapping[str, Mapping[str, Delta]]):
    """An adapter's changes by component and module, of which those that can be are stacked.

    Single layers are made up of the stacks at the first look, so that a swap, which takes the stacks, never pays for
    them.
    """

    def __init__(
        self, components: Sequence[str], stacks: Sequence[LowRankStack], singles: Sequence[SingleLayer]
    ) -> None:
        self._components = tuple(components)
        self.stacks = tuple(stacks)
        self.singles = tuple(singles)

    def __getitem__(self, component: str) -> Mapping[str, Delta]:
        return self._layers[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors, those of a stack as one."""
        for stack in self.stacks:
            yield stack.downs
            yield stack.ups
        for _, _, delta in self.singles:
            yield from tensors_of(delta)

    def mapped(self, change: Callable[[Tensor], Tensor], change_single: Callable[[Delta], Delta]) -> StackedLayers:
        """Return the same changes with every stacked tensor and every single change replaced."""
        stacks = [replace(stack, downs=change(stack.downs), ups=change(stack.ups)) for stack in self.stacks]
        singles = [(component, module, change_single(delta)) for component, module, delta in self.singles]
        return StackedLayers(self._components, stacks, singles)

    @cached_property
    def _layers(self) -> dict[str, dict[str, Delta]]:
        layers: dict[str, dict[str, Delta]] = {component: {} for component in self._components}
        for stack in self.stacks:
            layers[stack.component].update(stack.layers())
        for component, module, delta in self.singles:
            layers[component][module] = delta
        return layers


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a file the base understood.

    Counts are in layers, and a tensor that is no part of one counts as one; `unmatched` names some of what the base
    does not have, `ranks` the smallest and the largest inner width.
    """

    layers_matched: int
    layers_in_file: int
    unmatched: tuple[str, ...] = ()
    ranks: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class ParsedAdapter:
    """An adapter checked against one base: component name -> module name -> change.

    Every named layer exists in that base with fitting shapes; every tensor is finite and in that layer's dtype.
    `digest` is the sha256 of what it was read from, in hex: adapters of one digest are the same. `ti_tokens` are the
    embeddings that it teaches its text encoders, [words, width] by component, in the embedding's dtype; row i is
    the word `<si>`.
    """

    digest: str
    components: Mapping[str, Mapping[str, Delta]] = field(repr=False)
    coverage: Coverage
    ti_tokens: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors()) + sum(rows.nbytes for rows in self.ti_tokens.values())

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of all changes, as they lie: those of a stack together."""
        if isinstance(self.components, StackedLayers):
            yield from self.components.tensors()
            return
        for _, _, delta in self.layers():
            yield from tensors_of(delta)

    def layers(self) -> Iterator[tuple[str, str, Delta]]:
        """Yield (component, module, change) in the adapter's own order."""
        for component, modules in self.components.items():
            for module, delta in modules.items():
                yield component, module, delta


def tensors_of(delta: Delta) -> Iterator[Tensor]:
    """Yield the tensors of a change, in field order."""
    for part in fields(delta):
        value = getattr(delta, part.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Direction):
            yield from tensors_of(value)


def divisor_of(rank: int, *, is_rank_stabilised: bool) -> float:
    """Return what alpha is divided by: the rank, or its square root under rank stabilisation (rsLoRA)."""
    return math.sqrt(rank) if is_rank_stabilised else float(rank)


def dtype_named(name: str) -> torch.dtype:
    """Return torch's dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous host tensor; writing to the view writes the tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
