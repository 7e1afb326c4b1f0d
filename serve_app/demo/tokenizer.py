"""A CLIP tokenizer made from nothing: byte-level pair encoding learned on the demo's own captions.

Any text encodes without unknown tokens, because all 256 bytes are in the
vocabulary, alone and at the end of a word; words that the pictures know are single tokens.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from serve_app.demo.scenes import caption, known_words, sample_scenes, unrelated_caption
from serve_app.demo.styles import STYLES

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_MAX_TOKENS = 77
_MERGES = 640

Pieces = tuple[str, ...]


def build_tokenizer(folder: Path, seed: int = 0) -> CLIPTokenizer:
    """Learn the tokenizer and write it in the layout of a Hub repository."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(_count_words(random.Random(seed), set(alphabet)), _MERGES)
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), _BEGIN, _END])}
    folder.mkdir(parents=True, exist_ok=True)
    learned: dict[str, Any] = {"vocab": vocabulary, "merges": merges}
    tokenizer = CLIPTokenizer(**learned, model_max_length=_MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    special = {"bos_token": _BEGIN, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    return tokenizer


def _count_words(rng: random.Random, alphabet: set[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for scene in sample_scenes(3000, rng):
        words.update(caption(scene, rng, filler=0)[0].replace(",", " ").split())
    for phrase in (*known_words(), *(style.trigger for style in STYLES.values())):
        words.update(phrase.split() * 20)
    for _ in range(300):
        words.update(unrelated_caption(rng).replace(",", " ").split())
    return Counter({word: count for word, count in words.items() if alphabet.issuperset(word)})


def _learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    split: dict[str, Pieces] = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merge(pieces, best) for word, pieces in split.items()}
    return merges


def _merge(pieces: Pieces, pair: tuple[str, str]) -> Pieces:
    merged: list[str] = []
    i = 0
    while i < len(pieces):
        step = 2 if pieces[i : i + 2] == pair else 1
        merged.append("".join(pieces[i : i + step]))
        i += step
    return tuple(merged)
