from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.http.negotiation import FORMATS, choose_format, prefers_page
from serve_app.errors import NotAcceptable


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "jpeg"),
        ("", "jpeg"),
        ("*/*", "jpeg"),
        ("*", "jpeg"),
        ("image/*", "jpeg"),
        ("image/png", "png"),
        ("image/jpg", "jpeg"),
        ("IMAGE/WEBP", "webp"),
        ("image/png;q=0.5, image/webp;q=0.9", "webp"),
        ("image/png; q=0.5 , image/webp; Q=0.4", "png"),
        ("image/webp,image/png", "webp"),
        ("image/avif,image/webp,image/*,*/*;q=0.8", "webp"),
        ("image/*, image/jpeg;q=0", "png"),
        ("image/jpeg;q=0, image/png;q=0, */*", "webp"),
        ("*/*;q=0.1, image/png;q=0.05", "jpeg"),
        ("application/json, image/png;q=0.2", "png"),
        ("image/png;q=broken, image/webp", "webp"),
        ("text/html;level=1, image/png;quality=3", "png"),
    ],
)
def test_the_format_follows_the_accept_header(accept: str | None, chosen: str) -> None:
    assert choose_format(accept) == chosen


@pytest.mark.parametrize(
    "accept", ["application/json", "image/gif", "image/png;q=0", "*/*;q=0", "text/*", ",", "image/png;q=nan"]
)
def test_a_header_that_excludes_every_format_is_not_acceptable(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="image/jpeg, image/png, image/webp"):
        choose_format(accept)


@given(st.text(alphabet='imagepnjwb/*;=,q.019 \t"', max_size=60))
def test_any_text_is_either_a_format_or_not_acceptable(accept: str) -> None:
    with contextlib.suppress(NotAcceptable):
        assert choose_format(accept) in FORMATS


@given(st.permutations([("png", 0.9), ("jpeg", 0.5), ("webp", 0.1)]))
def test_the_highest_quality_wins_in_any_order(entries: list[tuple[str, float]]) -> None:
    assert choose_format(",".join(f"image/{name};q={quality}" for name, quality in entries)) == "png"


@pytest.mark.parametrize(
    ("accept", "is_page"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("text/html", True),
        ("*/*", False),
        (None, False),
        ("application/json, text/html", False),
        ("application/json;q=0.5, text/html", True),
        ("text/html;q=0", False),
    ],
)
def test_only_a_caller_that_wants_html_first_gets_the_page(accept: str | None, is_page: bool) -> None:
    assert prefers_page(accept) is is_page
