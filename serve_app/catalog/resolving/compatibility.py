"""Which adapters may be combined in one request, and on which base.

Owns the rules; pure. Finding out what adapters are is `serve_app.catalog.reading.inspector`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.catalog.reading.inspector import AdapterInfo
from serve_app.config import AppConfig, BaseModelConfig
from serve_app.core import AdapterRef, AdapterSpec
from serve_app.errors import MalformedRequest, OutOfBounds


def check_named(refs: Sequence[AdapterRef], config: AppConfig) -> None:
    """Refuse more adapters than any base takes.

    Raises:
        OutOfBounds: more adapters than any base takes.
    """
    most = max(base.limits.max_adapters for base in config.bases)
    if len(refs) > most:
        raise OutOfBounds("loras", f"{len(refs)} adapters", f"at most {most}")


def check_distinct(refs: Sequence[AdapterRef], findings: Sequence[AdapterInfo]) -> None:
    """Refuse an adapter that is named twice, in any spellings: its scales would add up past their limit.

    Raises:
        MalformedRequest: two of the references mean the same bytes.
    """
    named: dict[str, str] = {}
    for ref, finding in zip(refs, findings, strict=True):
        other = named.get(finding.content)
        named[finding.content] = ref.id
        if other is not None:
            again = "" if other == ref.id else f", as {other} and as {ref.id}"
            raise MalformedRequest(
                f"adapter {ref.id} is named twice{again}; name it once, with the scale it should have"
            )


def check_ti_tokens(specs: Sequence[AdapterSpec]) -> None:
    """Refuse adapters whose words would be mistaken for each other's.

    Raises:
        MalformedRequest: several bring words.
    """
    teaching = [spec.id for spec in specs if spec.embeddings is not None]
    if len(teaching) > 1:
        raise MalformedRequest(
            f"adapters {' and '.join(teaching)} each bring words of their own, all called <s0>, <s1>, ...; "
            "name only one of them in a request"
        )


def spec_on(finding: AdapterInfo, base: BaseModelConfig, config: AppConfig) -> AdapterSpec:
    """Return an adapter's spec on a base.

    Raises:
        BaseNotServed: none of its bases is served, and its structure does not fit this one.
        BaseMismatch: it is for another one.
        RefusedAdapter: it is over a limit of the base.
    """
    original = config.original_of(base.id)
    # What is for a base is for its canary.
    if original is None or not finding.fits(original):
        finding.require_fit(base, _served_ids(config))
    return finding.spec_for(base)


def common_base(findings: Sequence[AdapterInfo], config: AppConfig) -> BaseModelConfig:
    """Return the base that serves all the adapters of a request that names none.

    Raises:
        BaseNotServed: one of them is for no served base, or it is open which is meant.
        MalformedRequest: they are for different bases.
    """
    if not findings:
        return config.default
    for finding in findings:
        finding.require_served(_served_ids(config))
    certain = [finding for finding in findings if not finding.base_match.is_ambiguous]
    leading = certain[0] if certain else findings[0]
    common = [
        base
        for base_id in leading.base_match.bases
        if all(base_id in finding.base_match.bases for finding in findings)
        and (base := config.base(base_id)) is not None
    ]
    if not common:
        raise _cannot_combine(leading, findings)
    if not certain and (len(common) > 1 or leading.base_match.rivals):
        raise leading.ambiguity()
    return common[0]


def _cannot_combine(leading: AdapterInfo, findings: Sequence[AdapterInfo]) -> MalformedRequest:
    mine = leading.base_match
    other = next(f for f in findings if not set(mine.bases) & set(f.base_match.bases) or f is findings[-1])
    return MalformedRequest(
        f"adapter {leading.id} is for {mine.made_for}, but adapter {other.id} is for "
        f"{other.base_match.made_for}: they cannot be combined"
    )


def _served_ids(config: AppConfig) -> list[str]:
    return [base.id for base in config.bases]
