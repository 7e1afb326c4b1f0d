"""Prompts with weights, and longer than the window of CLIP, as embeddings.

Owns how a prompt is cut into chunks, and what a weight does to an embedding. The texts are encoded by the pipeline
itself, chunk by chunk, so that a prompt of one chunk without weights has the bits of the plain one. Must not know
requests or passes.

A1111 multiplies the embedding of a word by its weight, and then that of the whole chunk so that its mean is as before,
for each text encoder by itself. ComfyUI moves the embedding of a word away from that of an empty prompt, by its weight.
Embeddings that hold for the whole prompt (SDXL's pooled ones) are those of the first chunk, without weights, in both.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, CLIPTextModel, CLIPTextModelWithProjection

from serve_app.errors import OutOfBounds
from serve_app.prompt_syntax import Section, WeighingSyntax, weighted

MAX_CHUNKS = 8

# Where a chunk is full, A1111 goes back this far to a comma; ComfyUI moves fragments of fewer tokens as a whole.
_COMMA_REACH = 20
_SPLIT_FROM = 8
_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

# The tokens that are read together, with their weights.
Chunk = list[tuple[int, float]]
# One chunk for each tokenizer, by the name of its text encoder.
Row = dict[str, Chunk]


def reads_chunks(encoders: Sequence[torch.nn.Module]) -> bool:
    """Say whether text encoders are all CLIP's, whose embeddings of several chunks can stand beside each other."""
    return bool(encoders) and all(isinstance(one, CLIPTextModel | CLIPTextModelWithProjection) for one in encoders)


class ChunkCounter:
    """Says how many chunks the denoiser reads; safe in any thread, since its tokenizers are its own."""

    def __init__(self, pipeline: Any) -> None:
        self._tokenizers = copy.deepcopy(_tokenizers_of(pipeline))

    def count(self, prompt: str, negative_prompt: str | None, syntax: WeighingSyntax) -> int:
        """Return the number for both texts together.

        Raises:
            OutOfBounds: a text has more than `MAX_CHUNKS`.
        """
        texts = {"prompt": prompt, "negative_prompt": negative_prompt or ""}
        counts = {name: len(_rows_of(text, self._tokenizers, syntax)) for name, text in texts.items()}
        for name, count in counts.items():
            if count > MAX_CHUNKS:
                raise OutOfBounds(name, f"{count} chunks long", f"at most {MAX_CHUNKS} chunks of 75 tokens")
        return math.lcm(*counts.values())


def with_embeddings(
    pipeline: Any, arguments: Mapping[str, Any], syntax: WeighingSyntax, *, is_guided: bool
) -> dict[str, Any]:
    """Return the arguments of a call with embeddings in place of texts; for the device thread.

    All texts of a call get one number of chunks: fewer are repeated, which attention does not tell from the text alone.
    """
    tokenizers = _tokenizers_of(pipeline)
    sides: list[list[str]] = [arguments["prompt"]]
    if is_guided and "negative_prompt" in arguments:
        sides.append(arguments["negative_prompt"])
    read = {text: _rows_of(text, tokenizers, syntax) for side in sides for text in side}
    count = math.lcm(*map(len, read.values()))
    empty: Row = {encoder: [] for encoder in tokenizers}
    rows = [[row for text in side for row in itertools.islice(itertools.cycle(read[text]), count)] for side in sides]
    encoded = _encode(pipeline, [[*side, empty] for side in rows], is_guided=is_guided, skip=arguments.get("clip_skip"))
    found: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    for name, value in encoded.items():
        if "pooled" in name:
            found[name] = value[:-1:count]
            continue
        # The substitute for no negative prompt has no weights.
        own = rows[0] if "negative" not in name else rows[1] if len(rows) > 1 else [empty] * len(rows[0])
        weighed = _weigh(value, own, _widths_of(pipeline), syntax)
        found[name] = weighed.reshape(-1, count * value.shape[1], value.shape[2])
    return {**arguments, **found}


def _tokenizers_of(pipeline: Any) -> dict[str, Any]:
    names = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    found = {encoder: getattr(pipeline, name, None) for encoder, name in names.items()}
    return {encoder: tokenizer for encoder, tokenizer in found.items() if tokenizer is not None}


def _widths_of(pipeline: Any) -> dict[str, int]:
    return {encoder: getattr(pipeline, encoder).config.hidden_size for encoder in _tokenizers_of(pipeline)}


def _rows_of(text: str, tokenizers: Mapping[str, Any], syntax: WeighingSyntax) -> list[Row]:
    """Return the chunks of a text, as many for each tokenizer."""
    sections = weighted(text, syntax)
    chunks = [_chunks(sections, tokenizer, syntax) for tokenizer in tokenizers.values()]
    return [dict(zip(tokenizers, row, strict=True)) for row in itertools.zip_longest(*chunks, fillvalue=[])]


def _chunks(sections: Sequence[Section], tokenizer: Any, syntax: WeighingSyntax) -> list[Chunk]:
    room = tokenizer.model_max_length - 2
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    found: list[Chunk] = []
    for section in sections:
        options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        fragments = [[(token, one.weight) for token in tokenizer(one.text, **options).input_ids] for one in section]
        if syntax == "a1111":
            found += _cut_at_commas(list(itertools.chain(*fragments)), room, comma)
        else:
            found += _cut_between(fragments, room)
    # The text after the last BREAK may be empty.
    return found[:-1] if len(found) > 1 and not found[-1] else found


def _cut_at_commas(tokens: Chunk, room: int, comma: int) -> list[Chunk]:
    found: list[Chunk] = [[]]
    after_comma: int | None = None
    for token in tokens:
        if len(found[-1]) == room:
            is_near = token[0] != comma and after_comma is not None and room - after_comma < _COMMA_REACH
            border = after_comma if is_near else room
            found[-1:] = [found[-1][:border], found[-1][border:]]
            after_comma = None
        found[-1].append(token)
        if token[0] == comma:
            after_comma = len(found[-1])
    return found


def _cut_between(fragments: Sequence[Chunk], room: int) -> list[Chunk]:
    found: list[Chunk] = [[]]
    for fragment in fragments:
        rest = fragment
        while len(found[-1]) + len(rest) > room:
            is_cut = len(rest) >= _SPLIT_FROM or not found[-1]
            border = room - len(found[-1]) if is_cut else 0
            found[-1] += rest[:border]
            rest = rest[border:]
            found.append([])
        found[-1] += rest
    return found


def _encode(pipeline: Any, sides: Sequence[Sequence[Row]], *, is_guided: bool, skip: int | None) -> dict[str, Tensor]:
    """Return what the pipeline makes of the rows of the prompts and of the negatives, where there are any."""
    rows = list(itertools.chain(*sides))
    view = copy.copy(pipeline)
    for encoder, tokenizer in _tokenizers_of(pipeline).items():
        view.__dict__[encoder.replace("text_encoder", "tokenizer")] = _Numbered(
            tokenizer, [row[encoder] for row in rows]
        )
    numbers = [str(number) for number in range(len(rows))]
    encoded = view.encode_prompt(
        prompt=numbers[: len(sides[0])],
        device=view._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=is_guided,
        negative_prompt=numbers[len(sides[0]) :] or None,
        clip_skip=skip,
    )
    return {name: value for name, value in zip(_EMBEDDINGS, encoded, strict=False) if value is not None}


class _Numbered:
    """A tokenizer for which the number of a chunk stands for it; any other text is as ever."""

    def __init__(self, tokenizer: Any, chunks: Sequence[Chunk]) -> None:
        self._tokenizer = tokenizer
        self._chunks = chunks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Sequence[str], **options: Any) -> BatchEncoding:
        if not all(text.isdecimal() for text in texts):
            return self._tokenizer(texts, **options)
        own, size = self._tokenizer, self._tokenizer.model_max_length
        ids = [[own.bos_token_id, *(token for token, _ in self._chunks[int(text)]), own.eos_token_id] for text in texts]
        padded = [[*row, *[own.pad_token_id] * (size - len(row))] for row in ids]
        mask = [[1] * len(row) + [0] * (size - len(row)) for row in ids]
        return BatchEncoding({"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)})


def _weigh(embeddings: Tensor, rows: Sequence[Row], widths: Mapping[str, int], syntax: WeighingSyntax) -> Tensor:
    """Weigh embeddings [rows + 1, tokens, width]; the last is that of an empty text and left out."""
    parts = embeddings.split(list(widths.values()), dim=-1)
    weighed = [
        torch.stack([_weigh_one(part[index], part[-1], row[encoder], syntax) for index, row in enumerate(rows)])
        for encoder, part in zip(widths, parts, strict=True)
    ]
    return torch.cat(weighed, dim=-1)


def _weigh_one(embedding: Tensor, empty: Tensor, chunk: Chunk, syntax: WeighingSyntax) -> Tensor:
    if all(weight == 1.0 for _, weight in chunk):
        return embedding
    weights = torch.ones(len(embedding), 1)
    weights[1 : len(chunk) + 1, 0] = torch.tensor([weight for _, weight in chunk])
    weights, own, none = weights.to(embedding.device), embedding.float(), empty.float()
    if syntax == "comfyui":
        return torch.where(weights == 1.0, own, (own - none) * weights + none).to(embedding.dtype)
    weighed = own * weights
    return (weighed * (own.mean() / weighed.mean())).to(embedding.dtype)
