"""The optimiser, the learning-rate curve and the averaged weights of every training stage."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of parameters, with a warm-up of the decay."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._live = list(parameters)
        self._average = [p.detach().clone() for p in self._live]
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._live], 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap live and averaged weights in place; calling it twice changes nothing."""
        for live, average in zip(self._live, self._average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)


def rate_at(step: int, total: int, *, warm_up: int = 50, floor: float = 0.02) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine decay to the floor."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, total - warm_up)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def orthogonal(gradient: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with equal singular values, by Newton-Schulz (Jordan et al. 2024, "Muon").

    The polynomial is evaluated on the small Gram matrix and multiplied in once,
    which costs a fifth of iterating on the wide matrix itself.
    """
    wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    eye = torch.eye(len(gram), dtype=gram.dtype)
    product = eye
    for _ in range(steps):
        factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
        gram = factor @ gram @ factor
        product = factor @ product
    wide = product @ wide
    return wide if gradient.shape[0] <= gradient.shape[1] else wide.T


class Muon:
    """Orthogonalised momentum for matrices and convolutions, AdamW for everything else.

    Tall matrices take larger steps, which suits whole layers but not the halves of a LoRA.

    Not a `torch.optim.Optimizer`: the learning rates are arguments of `step`.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rate: float,
        small_rate: float,
        momentum: float = 0.95,
        small_names: tuple[str, ...] = (),
        stretches_tall: bool = True,
    ) -> None:
        named = list(named)
        self._parameters = [p for _, p in named]
        is_matrix = [p.ndim >= 2 and not any(s in name for s in small_names) for name, p in named]
        self._matrices = [p for (_, p), big in zip(named, is_matrix, strict=True) if big]
        self._momenta = [torch.zeros_like(p) for p in self._matrices]
        rest = [p for (_, p), big in zip(named, is_matrix, strict=True) if not big]
        adam = torch.optim.AdamW(rest, lr=small_rate, betas=(0.9, 0.98), weight_decay=1e-4) if rest else None
        self._adam, self._stretches_tall = adam, stretches_tall
        self._rate, self._small_rate, self._momentum = rate, small_rate, momentum

    def step(self, loss: Tensor, share: float) -> None:
        """Backpropagate the loss and take one step at this share of the peak rates."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._matrix_step(share)
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = self._small_rate * share
            self._adam.step()

    @torch.no_grad()
    def _matrix_step(self, share: float) -> None:
        for parameter, momentum in zip(self._matrices, self._momenta, strict=True):
            if parameter.grad is None:
                continue
            momentum.lerp_(parameter.grad, 1 - self._momentum)
            update = orthogonal(parameter.grad.lerp(momentum, self._momentum).reshape(len(parameter), -1))
            is_tall = self._stretches_tall and update.shape[0] > update.shape[1]
            stretch = (update.shape[0] / update.shape[1]) ** 0.5 if is_tall else 1.0
            parameter.add_(update.reshape(parameter.shape), alpha=-self._rate * share * stretch)


def variance_preserving_(module: nn.Module, branch: float = 0.3) -> None:
    """Initialise weights to keep the signal's variance, biases to zero, residual branches damped.

    The default initialisation shrinks the signal layer by layer until, after a few
    normalisations, a tiny network's output no longer depends on its input.
    """
    ends = ("conv2", "to_out.0", "proj_out", "ff.net.2")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gain = branch if name.endswith(ends) else 1.0
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
