"""What no base could take is refused before any adapter is looked up."""

from __future__ import annotations

import pytest

from serve_app.catalog.resolving.compatibility import check_named
from serve_app.config import AppConfig
from serve_app.core import AdapterRef
from serve_app.errors import OutOfBounds

CONFIG = AppConfig.model_validate(
    {
        "bases": [
            {"id": name, "source": {"embedded": name}, "limits": {"max_adapters": most}}
            for name, most in (("few", 2), ("many", 5), ("some", 3))
        ]
    }
)


def named(count: int) -> list[AdapterRef]:
    return [AdapterRef(f"acme/{number}") for number in range(count)]


def test_as_many_adapters_may_be_named_as_the_base_that_takes_most_does() -> None:
    check_named(named(5), CONFIG)
    with pytest.raises(OutOfBounds, match="6 adapters.*at most 5"):
        check_named(named(6), CONFIG)
