"""An adapter's words, known to a live pipeline's tokenizers and text encoders for one pass.

Owns the copies of tokenizers and of embeddings. Used by one thread, the device thread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from serve_app.engine.adapters.inversion import word
from serve_app.engine.base.manifest import TOKENIZER

# Copies differ by their number of words alone, so that few of them serve every adapter.
TOKENIZERS_KEPT = 16


class TextualInversion:
    """The text encoders of a base, which can learn words and forget them again.

    Invariants: the base's tokenizers and embedding tensors are never written. Words are known inside `loaded` alone;
    afterwards everything is as it was, even after a failure inside. An embedding's copy, the base's rows and space for
    the words, is made when first needed and kept.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._copies: dict[str, Tensor] = {}
        self._tokenizers: dict[tuple[str, int], Any] = {}

    @contextmanager
    def loaded(self, ti_tokens: Mapping[str, Tensor], pipelines: Sequence[Any]) -> Iterator[None]:
        """Let prompts of `pipelines`, which share the base's text encoders, name words; rows by component."""
        patches = [_EncoderPatch(self._pipeline, component) for component in ti_tokens]
        try:
            for patch, rows in zip(patches, ti_tokens.values(), strict=True):
                tokenizer = self._tokenizer(patch, len(rows))
                ids = tokenizer.convert_tokens_to_ids([word(place) for place in range(len(rows))])
                patch.bind(self._copy(patch, rows, ids), tokenizer, pipelines)
            yield
        finally:
            for patch in patches:
                patch.undo(pipelines)

    def _tokenizer(self, patch: _EncoderPatch, words: int) -> Any:
        key = patch.tokenizer_name, words
        found = self._tokenizers.pop(key, None)
        if found is None:
            found = copy.deepcopy(patch.tokenizer)
            found.add_tokens([word(place) for place in range(words)])
        self._tokenizers[key] = found  # the most recently used is last
        if len(self._tokenizers) > TOKENIZERS_KEPT:
            del self._tokenizers[next(iter(self._tokenizers))]
        return found

    def _copy(self, patch: _EncoderPatch, rows: Tensor, ids: Sequence[int]) -> Tensor:
        """Return the base's rows followed, or where they are unused replaced, by those of the words."""
        needed, copied = max(*ids, len(patch.base_rows) - 1) + 1, self._copies.get(patch.component)
        if copied is None or len(copied) < needed:
            # Only rows that some tokenizer names are ever read, so that those between need no values.
            copied = patch.base_rows.new_zeros(needed, patch.base_rows.shape[1])
            copied[: len(patch.base_rows)] = patch.base_rows
            self._copies[patch.component] = copied
        copied[torch.tensor(ids, device=copied.device)] = rows.to(copied.device)
        return copied


class _EncoderPatch:
    """One text encoder as it is, for as long as it is changed."""

    def __init__(self, pipeline: Any, component: str) -> None:
        self.component = component
        self.tokenizer_name = component.replace(*TOKENIZER)
        self.tokenizer: Any = getattr(pipeline, self.tokenizer_name)
        self._weight: nn.Parameter = getattr(pipeline, component).get_input_embeddings().weight
        self.base_rows: Tensor = self._weight.data

    def bind(self, embedding: Tensor, tokenizer: Any, pipelines: Sequence[Any]) -> None:
        self._weight.data = embedding
        for pipeline in pipelines:
            setattr(pipeline, self.tokenizer_name, tokenizer)

    def undo(self, pipelines: Sequence[Any]) -> None:
        self._weight.data = self.base_rows
        for pipeline in pipelines:
            setattr(pipeline, self.tokenizer_name, self.tokenizer)
