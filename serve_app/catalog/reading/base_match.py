"""Which of the served bases an adapter is for: its card's word, checked against its structure.

Pure: claims and facts in, a placement or the reason for a refusal out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.catalog.reading.bases import BaseArchitecture
from serve_app.catalog.reading.header import HeaderFacts
from serve_app.errors import LoraplexError
from serve_app.families.structure import FAMILIES, published
from serve_app.refusals import NoLayerMatches, ShapeMismatch

_NAMES = frozenset(family.name for family in FAMILIES)


@dataclass(frozen=True, slots=True)
class BaseMatch:
    """The bases that an adapter may serve on, the preferred one first.

    `made_for` names the base as the caller should read it, whether or not it is served. Several bases without
    a word of the card are ambiguous: the request has to name one. So is a single one where the file fits `rivals` as
    well, families that are not served. `by_name` are bases that the file fits in structure
    though its card names another that is not served, such as a fine-tune: they serve it where the request names them.
    """

    bases: tuple[str, ...]
    made_for: str
    is_ambiguous: bool = False
    by_name: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


def match_bases(
    adapter: str,
    claims: Sequence[str],
    claimed: Sequence[str],
    header: HeaderFacts,
    bases: Sequence[BaseArchitecture],
) -> BaseMatch:
    """Return where an adapter belongs; `claimed` are the ids of the served bases that its card's `claims`
    mean.

    Raises:
        ShapeMismatch: the card names a served base that the file's widths contradict.
        NoLayerMatches: the card names a served base of another kind of network.
    """
    faults = {base.id: contradiction(header, base) for base in bases}
    if claimed:
        fitting = tuple(base_id for base_id in claimed if faults[base_id] is None)
        if not fitting:
            raise _refusal(adapter, claimed[0], header, bases)
        return BaseMatch(fitting, made_for=fitting[0])
    if claims:
        fitting = _by_structure(header, [base for base in bases if faults[base.id] is None])
        return BaseMatch((), made_for=claims[0], by_name=fitting.bases)
    return _by_structure(header, [base for base in bases if faults[base.id] is None])


def _by_structure(header: HeaderFacts, possible: Sequence[BaseArchitecture]) -> BaseMatch:
    certain = [base for base in possible if header.text_width and base.text_width == header.text_width]
    certain = certain or [base for base in possible if base.family is not None and base.family in header.families]
    candidates = certain or list(possible)
    stated = [base for base in candidates if header.family is not None and base.family == header.family]
    if stated:
        candidates = stated
    elif not certain and (header.family is not None or header.families):
        # The file says what it is, and nothing that is served is known to be that.
        candidates = [base for base in candidates if base.family is None]
    ids = tuple(base.id for base in candidates)
    made_for = header.family or " or ".join(sorted(published(header.families, header.hidden_widths)))
    known = {base.family for base in candidates}
    rivals = published(header.families, header.hidden_widths) - known if header.family is None and ids else ()
    return BaseMatch(
        ids,
        ids[0] if ids else made_for or "a base that cannot be told",
        is_ambiguous=len(ids) > 1 or bool(rivals),
        rivals=tuple(sorted(rivals)),
    )


def contradiction(header: HeaderFacts, base: BaseArchitecture) -> str | None:
    """Return why a file cannot fit a base, or None; an unknown fact contradicts nothing."""
    denoisers = header.components & {"unet", "transformer"}
    if base.denoiser is not None and denoisers and base.denoiser not in denoisers:
        (other,) = denoisers
        return f"its layers are those of a {other}, but {base.id} has a {base.denoiser}"
    if header.text_width and base.text_width and header.text_width != base.text_width:
        return (
            f"its cross-attention takes text features {header.text_width} wide, "
            f"but those of {base.id} are {base.text_width} wide"
        )
    if header.families and base.family in _NAMES and base.family not in header.families:
        return f"its layers have the names of {' or '.join(sorted(header.families))}, but {base.id} is {base.family}"
    strange = header.hidden_widths - base.hidden_widths
    if strange and base.hidden_widths:
        widths = _list(base.hidden_widths)
        return f"its self-attention is {_list(strange)} wide, but the blocks of {base.id} are {widths}"
    for kind, needed in header.depths:
        depth = dict(base.depths).get(kind)
        if depth is not None and needed > depth:
            return f"it has layers of {needed} {kind} blocks, but {base.id} has {depth}"
    return None


def _refusal(adapter: str, claimed: str, header: HeaderFacts, bases: Sequence[BaseArchitecture]) -> LoraplexError:
    facts = next(base for base in bases if base.id == claimed)
    fault = contradiction(header, facts)
    fits = [base.id for base in bases if header.text_width and base.text_width == header.text_width]
    hint = f" (they fit {', '.join(fits)})" if fits else ""
    reason = f"its card names {claimed}, but {fault}{hint}"
    is_other_network = facts.denoiser is not None and facts.denoiser not in header.components
    return (NoLayerMatches if is_other_network and header.text_width is None else ShapeMismatch)(adapter, reason)


def _list(numbers: frozenset[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))
