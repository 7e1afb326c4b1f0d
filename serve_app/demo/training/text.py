"""The second stage: text encoders that read what a caption says, then stay frozen.

Throw-away heads ask every token from the end of the text on for the shape, the
colours and the size, or for "not said"; the UNet then finds them wherever it looks.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from serve_app.demo.architectures import make_text_encoders, tokenize
from serve_app.demo.scenes import ATTRIBUTES, Wanted, caption, sample_scenes, unrelated_caption
from serve_app.demo.styles import STYLES
from serve_app.demo.training.optimiser import rate_at

log = logging.getLogger(__name__)

_PEAK_RATE = 2e-3
_BATCH = 64
_WIDTHS = [len(values) + 1 for values in ATTRIBUTES.values()]


class _Reader(nn.Module):
    """Encoders with one head on each hidden state that the pipeline uses, and on the pooled vector."""

    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.layers = (-1,) if len(encoders) == 1 else (-2, -1)
        taps = [encoder.config.hidden_size for encoder in encoders for _ in self.layers]
        pooled = [encoders[-1].config.projection_dim] if len(encoders) > 1 else []
        self.heads = nn.ModuleList(nn.Linear(width, sum(_WIDTHS)) for width in (*taps, *pooled))

    def forward(self, ids: Tensor, spots: Tensor) -> list[Tensor]:
        """Answers at the spots, (n, spots, answers) for each head."""
        states: list[Tensor] = []
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        for output in outputs:
            for layer in self.layers:
                state = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
                states.append(state.gather(1, spots[..., None].expand(-1, -1, state.shape[-1])))
        if len(outputs) > 1:
            states.append(outputs[-1].text_embeds[:, None])
        return [head(state) for head, state in zip(self.heads, states, strict=True)]


def train_text_encoders(family: str, tokenizer: CLIPTokenizer, folder: Path, steps: int, seed: int) -> float:
    """Train and save this family's text encoders; the share of attributes read at the end."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    encoders = make_text_encoders(family, tokenizer)
    reader = _Reader(encoders).train()
    parameters = list(reader.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=_PEAK_RATE, weight_decay=0.01)
    share_read = 0.0
    for step in range(steps):
        ids, answers = _batch(tokenizer, rng)
        losses, shares = zip(*(_grade(logits, answers) for logits in reader(ids, _spots(ids, tokenizer))), strict=True)
        for group in optimiser.param_groups:
            group["lr"] = _PEAK_RATE * rate_at(step, steps)
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        share_read += 0.05 * (min(shares) - share_read)
        if step % 100 == 0:
            log.info("%s text encoders step %d of %d: %.3f read", family, step, steps, share_read)
    for i, encoder in enumerate(encoders):
        encoder.eval().save_pretrained(folder / ("text_encoder_2" if i else "text_encoder"))
    log.info("%s text encoders: %.4f of the attributes read", family, share_read)
    return round(share_read, 4)


def _batch(tokenizer: CLIPTokenizer, rng: random.Random) -> tuple[Tensor, list[Tensor]]:
    pairs = [_caption_or_noise(rng, text, told) for text, told in (caption(s, rng) for s in sample_scenes(_BATCH, rng))]
    answers = [
        torch.tensor([len(values) if (v := getattr(told, name)) is None else values.index(v) for _, told in pairs])
        for name, values in ATTRIBUTES.items()
    ]
    return tokenize(tokenizer, [text for text, _ in pairs]), answers


def _caption_or_noise(rng: random.Random, text: str, told: Wanted) -> tuple[str, Wanted]:
    draw = rng.random()
    if draw < 0.03:
        return "", Wanted()
    if draw < 0.09:
        return unrelated_caption(rng), Wanted()
    if draw < 0.3:
        return f"{text}, {STYLES[rng.choice(tuple(STYLES))].trigger}", told
    return text, told


def _spots(ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """The end-of-text token and three random paddings after it, (n, 4)."""
    first = (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    later = ((ids.shape[1] - 1 - first) * torch.rand(len(ids), 3)).long()
    return torch.cat([first, first + later], 1)


def _grade(logits: Tensor, answers: list[Tensor]) -> tuple[Tensor, float]:
    losses: list[Tensor] = []
    right: list[Tensor] = []
    for part, answer in zip(logits.split(_WIDTHS, -1), answers, strict=True):
        expected = answer[:, None].expand(part.shape[:-1])
        losses.append(F.cross_entropy(part.flatten(0, 1), expected.flatten()))
        right.append((part.argmax(-1) == expected).float().mean())
    return torch.stack(losses).sum(), float(torch.stack(right).mean())
