"""Model cards: the bases, trigger words and picture of an adapter.

Pure: text or a mapping in, `Card` out. A card is written by strangers, so nothing in it can raise: an
unreadable value counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import yaml

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.catalog.reading.stated_defaults import stated_defaults, text_of

MAX_FRONT_MATTER_CHARACTERS = 64 * 1024
MAX_FIELD_CHARACTERS = 1024
MAX_ITEMS = 1000
MAX_DEPTH = 16

_BASE_TAG = "base_model:"
_ADAPTER_TAG = "base_model:adapter:"
_RELATIONS = ("adapter:", "finetune:", "quantized:", "merge:")
_HUB_URLS = ("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/")
_NOTHING = ("", "~", "null", "none")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True, slots=True)
class Card:
    """The front matter of a card, as far as serving an adapter needs it.

    `adapter_tag_bases` come from tags that the Hub computes (`base_model:adapter:<id>`), `tag_bases` from
    those that do not say how the base was used. `base_hints` are names of whole families, which count where a base of
    that name is served. `example_prompt` and `picture`, a file of the repository, are those of its examples (`widget`).
    """

    base_models: tuple[str, ...] = ()
    relation: str | None = None
    tags: tuple[str, ...] = ()
    defaults: AdapterDefaults = NO_DEFAULTS
    adapter_tag_bases: tuple[str, ...] = ()
    tag_bases: tuple[str, ...] = ()
    base_hints: tuple[str, ...] = ()
    example_prompt: str | None = None
    picture: str | None = None

    @property
    def claims(self) -> tuple[str, ...]:
        """The bases that the card names, the most telling first, each once; a path on its author's disk names none."""
        named = dict.fromkeys((*self.adapter_tag_bases, *self.base_models, *self.tag_bases))
        return tuple(name for name in named if not _is_path(name))


class _ShallowLoader(yaml.BaseLoader):
    """Makes strings of everything, so that no value is ever interpreted, and gives up on deep nesting.

    Deeply nested YAML takes seconds to read, and no card needs it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError("too deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def parse_card(text: str) -> Card:
    """Return what a README's front matter says; an empty card where it cannot be read."""
    front_matter = _front_matter(text)
    if not front_matter:
        return Card()
    try:
        data: object = yaml.load(front_matter, Loader=_ShallowLoader)
    except (yaml.YAMLError, ValueError):
        return Card()
    return card_from(cast("Mapping[object, object]", data)) if isinstance(data, Mapping) else Card()


def card_from(data: Mapping[object, object], more_tags: tuple[str, ...] = ()) -> Card:
    """Return the card that parsed front matter makes, with the tags that the Hub computed for the
    repository."""
    tags = tuple(dict.fromkeys((*_strings(data.get("tags")), *more_tags)))[:MAX_ITEMS]
    relation = next(iter(_strings(data.get("base_model_relation"))), None)
    examples = _examples(data)
    return Card(
        base_models=tuple(_model_id(name) for name in _strings(data.get("base_model"))),
        relation=relation.lower() if relation else None,
        tags=tags,
        defaults=_defaults(data, examples),
        adapter_tag_bases=tuple(tag.removeprefix(_ADAPTER_TAG) for tag in tags if tag.startswith(_ADAPTER_TAG)),
        tag_bases=tuple(
            name
            for name in (tag.removeprefix(_BASE_TAG) for tag in tags if tag.startswith(_BASE_TAG))
            if not name.startswith(_RELATIONS)
        ),
        example_prompt=next((text for one in examples if (text := text_of(one.get("text"))) is not None), None),
        picture=next((name for one in examples if (name := _picture(one)) is not None), None),
    )


def _examples(data: Mapping[object, object]) -> list[Mapping[object, object]]:
    """Return the examples of a card, each a table; one that is none counts as empty."""
    widgets = data.get("widget")
    examples = cast("list[object]", widgets)[:MAX_ITEMS] if isinstance(widgets, list) else []
    return [cast("Mapping[object, object]", one) if isinstance(one, Mapping) else {} for one in examples]


def _picture(example: Mapping[object, object]) -> str | None:
    """Return the file of the repository that an example shows; never an address."""
    output = example.get("output")
    url = text_of(cast("Mapping[object, object]", output).get("url")) if isinstance(output, Mapping) else None
    name = (url or "").removeprefix("./")
    return name if name.lower().endswith(PICTURE_SUFFIXES) and "://" not in name else None


def _defaults(data: Mapping[object, object], examples: Sequence[Mapping[object, object]]) -> AdapterDefaults:
    """Return the card's own block for this service, over its general fields."""
    first: Mapping[object, object] = examples[0] if examples else {}
    prompt = next(iter(_strings(data.get("instance_prompt"))), None)
    shown = replace(stated_defaults(first.get("parameters")), scale=None, trigger_words=prompt)
    return stated_defaults(data.get("loraplex")).over(shown)


def _front_matter(text: str) -> str:
    opening, found, rest = text.lstrip("\ufeff \t\r\n")[: MAX_FRONT_MATTER_CHARACTERS + 4].partition("\n")
    if not found or opening.strip() != "---":
        return ""
    lines: list[str] = []
    for line in rest.splitlines():
        if line.rstrip() in ("---", "..."):
            return "\n".join(lines)
        lines.append(line)
    return ""


def _strings(value: object) -> tuple[str, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    texts = (item.strip() for item in items[:MAX_ITEMS] if isinstance(item, str))
    return tuple(text for text in texts if text.lower() not in _NOTHING and len(text) <= MAX_FIELD_CHARACTERS)


def _model_id(name: str) -> str:
    for url in _HUB_URLS:
        name = name.removeprefix(url)
    return name if _is_path(name) else name.strip("/")


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
