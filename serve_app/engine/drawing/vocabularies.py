"""An adapter's words lent to a live pipeline's tokenizers and text encoders, for one pass.

Owns the copies of tokenizers and the twins of embeddings. Used by one thread, the device thread.
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
    afterwards everything is as it was, whatever happened inside. An embedding's twin, the base's rows and room for
    the words, is made when first needed and kept.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._twins: dict[str, Tensor] = {}
        self._tokenizers: dict[tuple[str, int], Any] = {}

    @contextmanager
    def loaded(self, ti_tokens: Mapping[str, Tensor], pipelines: Sequence[Any]) -> Iterator[None]:
        """Let prompts of `pipelines`, which share the base's text encoders, name words; rows by component."""
        loans = [_EncoderPatch(self._pipeline, component) for component in ti_tokens]
        try:
            for loan, rows in zip(loans, ti_tokens.values(), strict=True):
                tokenizer = self._tokenizer(loan, len(rows))
                ids = tokenizer.convert_tokens_to_ids([word(place) for place in range(len(rows))])
                loan.bind(self._twin(loan, rows, ids), tokenizer, pipelines)
            yield
        finally:
            for loan in loans:
                loan.undo(pipelines)

    def _tokenizer(self, loan: _EncoderPatch, ti_tokens: int) -> Any:
        key = loan.tokenizer_name, ti_tokens
        found = self._tokenizers.pop(key, None)
        if found is None:
            found = copy.deepcopy(loan.tokenizer)
            found.add_tokens([word(place) for place in range(ti_tokens)])
        self._tokenizers[key] = found  # the most recently used is last
        if len(self._tokenizers) > TOKENIZERS_KEPT:
            del self._tokenizers[next(iter(self._tokenizers))]
        return found

    def _twin(self, loan: _EncoderPatch, rows: Tensor, ids: Sequence[int]) -> Tensor:
        """Return the base's rows followed, or where they are unused replaced, by those of the words."""
        needed, twin = max(*ids, len(loan.pristine) - 1) + 1, self._twins.get(loan.component)
        if twin is None or len(twin) < needed:
            # Only rows that some tokenizer names are ever read, so that those between need no values.
            twin = loan.pristine.new_zeros(needed, loan.pristine.shape[1])
            twin[: len(loan.pristine)] = loan.pristine
            self._twins[loan.component] = twin
        twin[torch.tensor(ids, device=twin.device)] = rows.to(twin.device)
        return twin


class _EncoderPatch:
    """One text encoder as it is, for as long as it is changed."""

    def __init__(self, pipeline: Any, component: str) -> None:
        self.component = component
        self.tokenizer_name = component.replace(*TOKENIZER)
        self.tokenizer: Any = getattr(pipeline, self.tokenizer_name)
        self._weight: nn.Parameter = getattr(pipeline, component).get_input_embeddings().weight
        self.pristine: Tensor = self._weight.data

    def bind(self, embedding: Tensor, tokenizer: Any, pipelines: Sequence[Any]) -> None:
        self._weight.data = embedding
        for pipeline in pipelines:
            setattr(pipeline, self.tokenizer_name, tokenizer)

    def undo(self, pipelines: Sequence[Any]) -> None:
        self._weight.data = self.pristine
        for pipeline in pipelines:
            setattr(pipeline, self.tokenizer_name, self.tokenizer)
