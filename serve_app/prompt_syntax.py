"""Prompts as A1111 and ComfyUI write them: adapters named in the text, and weights of its words.

Owns what the marks of the two syntaxes mean. Must not know tokenizers, bases or where adapters lie. Time and space are
linear in the length of any text.

Both: `(word)` weighs 1.1, `(word:1.3)` 1.3, and `\\(` is a parenthesis. In A1111's syntax `[word]` weighs 1/1.1, the
weights of groups within one another are multiplied, and `BREAK` begins a chunk of its own. In ComfyUI's `(word:1.3)` is
1.3 even inside other groups, and there are neither `[word]` nor `BREAK`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from serve_app.core import AdapterRef, PromptSyntax, Scales, UnresolvedRequest
from serve_app.errors import MalformedRequest, OutOfBounds

WeighingSyntax = Literal["a1111", "comfyui"]
SYNTAXES: tuple[PromptSyntax, ...] = get_args(PromptSyntax)
MAX_WEIGHT = 10.0
MAX_DEPTH = 64
MAX_TAGS = 64
MAX_NAME_LENGTH = 256

_STEP = 1.1
_TAG = re.compile(r"<(\w+):([^<>]*)>")
_ADAPTER_TAGS = ("lora", "lyco")
_MARKS = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")
# Syntax that A1111 draws with several prompts, one after the other or together.
_EDITING = re.compile(r"(?<!\\)\[[^\[\]]*(?:\||:\s*[.\d]+\s*\])")
_TOGETHER = re.compile(r"\bAND\b")


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of a prompt whose words have one weight."""

    text: str
    weight: float = 1.0


Section = tuple[Fragment, ...]
"""A part of a prompt without a forced chunk border; a prompt has at least one, which may be empty."""


def check_taken(syntax: PromptSyntax, base_id: str, *, weighs_words: bool) -> None:
    """Refuse a syntax on a base that reads prompts only as they are.

    Raises:
        MalformedRequest: so it is.
    """
    if syntax != "plain" and not weighs_words:
        raise MalformedRequest(
            f"{base_id} takes no 'prompt_syntax' but 'plain': weights and chunks are for bases whose prompts CLIP "
            "alone reads (SD 1.5, SD 2, SDXL)"
        )


def with_prompt_adapters(draft: UnresolvedRequest, syntax: PromptSyntax) -> UnresolvedRequest:
    """Return a request in a syntax, with the adapters that its prompt names after its own.

    Raises:
        MalformedRequest: as `adapters_in`, or the negative prompt names one.
    """
    if syntax == "plain":
        return replace(draft, prompt_syntax=syntax)
    prompt, adapters = adapters_in(draft.prompt)
    if _TAG.search(draft.negative_prompt or ""):
        raise MalformedRequest("'negative_prompt' names an adapter; name it in 'prompt', where it belongs")
    return replace(draft, prompt=prompt, adapters=(*draft.adapters, *adapters), prompt_syntax=syntax)


def adapters_in(prompt: str) -> tuple[str, tuple[AdapterRef, ...]]:
    """Return a prompt without its `<lora:name:0.8>`, and the adapters that these name.

    A second number is the scale of the denoiser; the first is then that of the text encoders, as in A1111.

    Raises:
        MalformedRequest: a tag that names no adapter, or a scale that is no number.
        OutOfBounds: more than `MAX_TAGS`.
    """
    tags = list(itertools.islice(_TAG.finditer(prompt), MAX_TAGS + 1))
    if len(tags) > MAX_TAGS:
        raise OutOfBounds("loras", f"over {MAX_TAGS} adapters in the prompt", f"at most {MAX_TAGS}")
    return _TAG.sub("", prompt), tuple(_adapter(tag[1], tag[2]) for tag in tags)


def _adapter(kind: str, words: str) -> AdapterRef:
    name, *numbers = (word.strip() for word in words.split(":"))
    tag = f"<{kind}:{words}>"[:100]
    if kind not in _ADAPTER_TAGS:
        raise MalformedRequest(f"'{tag}' names no adapter; write <lora:name:0.8>, or leave it out")
    try:
        scales = [float(number) for number in numbers]
    except ValueError:
        scales = [0.0] * 3
    if not name or len(name) > MAX_NAME_LENGTH or len(scales) > 2:
        raise MalformedRequest(f"'{tag}' is not of the form <lora:name:0.8> or <lora:name:0.8:0.6>")
    if len(set(scales)) == 2:
        return AdapterRef(name, Scales(denoiser=scales[1], text_encoder=scales[0]))
    return AdapterRef(name, scales[0] if scales else None)


def weighted(text: str, syntax: WeighingSyntax, what: str = "prompt") -> tuple[Section, ...]:
    """Return the words of a prompt with their weights; `what` is its field.

    Neighbours of one weight are one fragment, in ComfyUI's syntax only within a group.

    Raises:
        MalformedRequest: marks that have no meaning here, or a weight that is no number.
        OutOfBounds: a weight over `MAX_WEIGHT`, or groups deeper than `MAX_DEPTH`.
    """
    if syntax == "a1111" and (_EDITING.search(text) or _TOGETHER.search(text)):
        raise MalformedRequest(
            f"'{what}' has [a:b:0.5], [a|b] or AND, which draw from several prompts and are not served; leave them out"
        )
    reader = _Reader(syntax, what)
    for mark in _MARKS.finditer(text):
        reader.read(mark[0], mark[1])
    return reader.sections()


@dataclass(slots=True)
class _Piece:
    """A piece while its groups are read. `borders` counts the groups that began or ended before it where that keeps
    fragments apart; a final weight is not multiplied again."""

    text: str
    borders: int
    weight: float = 1.0
    is_final: bool = False
    is_break: bool = False


def _fragments(pieces: list[_Piece]) -> Iterator[Fragment]:
    for (weight, _), alike in itertools.groupby(pieces, lambda piece: (piece.weight, piece.borders)):
        yield Fragment("".join(piece.text for piece in alike), weight)


class _Reader:
    """Reads the marks of one text in their order. A piece is in `MAX_DEPTH` groups at most, so that time is linear."""

    def __init__(self, syntax: WeighingSyntax, what: str) -> None:
        self._is_a1111 = syntax == "a1111"
        self._what = what
        self._pieces: list[_Piece] = []
        self._open: dict[str, list[int]] = {"(": [], "[": []}
        self._borders = 0

    def read(self, mark: str, weight: str | None) -> None:
        if mark[0] == "\\":
            is_escape = len(mark) == 2 and (self._is_a1111 or mark[1] in "()")
            self._pieces.append(_Piece(mark[1:] if self._is_a1111 or is_escape else mark, self._borders))
        elif mark == "(" or (mark == "[" and self._is_a1111):
            self._begin(mark)
        elif mark[-1] == ")" and self._open["("]:
            self._end("(", _STEP if weight is None else self._number(weight), is_final=weight is not None)
        elif mark == "]" and self._open["["]:
            self._end("[", 1 / _STEP)
        elif mark[-1] == ")" and not self._is_a1111:
            raise self._unpaired()
        else:
            self._add(mark)

    def sections(self) -> tuple[Section, ...]:
        if self._open["("] and not self._is_a1111:
            raise self._unpaired()
        while self._open["("]:
            self._end("(", _STEP)
        while self._open["["]:
            self._end("[", 1 / _STEP)
        found: list[list[_Piece]] = [[]]
        for piece in self._pieces:
            if piece.is_break:
                found.append([])
            elif piece.text:
                found[-1].append(piece)
        return tuple(tuple(_fragments(pieces)) for pieces in found)

    def _begin(self, mark: str) -> None:
        self._borders += not self._is_a1111
        self._open[mark].append(len(self._pieces))
        depth = sum(map(len, self._open.values()))
        if depth > MAX_DEPTH:
            raise OutOfBounds(self._what, f"{depth} groups deep", f"at most {MAX_DEPTH} groups deep")

    def _end(self, mark: str, weight: float, *, is_final: bool = False) -> None:
        self._borders += not self._is_a1111
        for piece in self._pieces[self._open[mark].pop() :]:
            if piece.is_final or piece.is_break:
                continue
            piece.weight *= weight
            piece.is_final = is_final and not self._is_a1111
            if not abs(piece.weight) <= MAX_WEIGHT:
                named = f"weight of {piece.text.strip()[:60]}"
                raise OutOfBounds(named, f"{piece.weight:g}", f"from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")

    def _number(self, weight: str) -> float:
        try:
            return float(weight)
        except ValueError:
            raise MalformedRequest(f"'{self._what}' has the weight '{weight[:60]}', which is no number") from None

    def _add(self, text: str) -> None:
        first, *others = _BREAK.split(text) if self._is_a1111 else [text]
        self._pieces.append(_Piece(first, self._borders))
        for part in others:
            self._pieces += [_Piece("", self._borders, is_break=True), _Piece(part, self._borders)]

    def _unpaired(self) -> MalformedRequest:
        return MalformedRequest(
            f"'{self._what}' has a parenthesis without its other half; write \\( or \\) for one that is only text"
        )
