"""Edits with several reference pictures."""

from __future__ import annotations

import pytest

from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import OutOfBounds
from tests.engine_cases import photo
from tests.family_cases import MASK, asked, drawn, served


@pytest.fixture(scope="module")
def klein() -> BasePipeline:
    return served("flux2_klein")


def test_each_reference_changes_the_image_and_may_have_any_size(klein: BasePipeline) -> None:
    sizes = [(), (photo(32, 96),), (photo(32, 96), photo(16, 16)), (photo(16, 16), photo(32, 96))]
    outcomes = [drawn(klein, asked("edit", references=references)) for references in sizes]
    assert len({image.pixels for image, _ in outcomes}) == len(sizes)
    assert [warnings for _, warnings in outcomes] == [()] * len(sizes)


@pytest.mark.parametrize("name", ["flux2_klein", "bria_fibo_edit"])
def test_a_reference_that_is_too_long_is_refused_before_it_is_enlarged(name: str) -> None:
    with pytest.raises(OutOfBounds, match="100x10, but must be at most 8 times"):
        served(name).check(asked("edit", references=(photo(100, 10),)))


def test_a_family_of_one_picture_takes_the_first_and_says_so(klein: BasePipeline) -> None:
    further = (photo(32, 96),)
    kontext = served("flux_kontext")
    image, warnings = drawn(kontext, asked("edit", references=further))
    assert image == drawn(kontext, asked("edit"))[0]
    assert warnings == ("only the first of 2 pictures is used, since tiny/base takes one",)
    _, warnings = drawn(klein, asked("inpaint", references=further, mask=MASK))
    assert warnings == ("only the first of 2 pictures is used, since there is a mask",)


def test_a_base_says_whether_edits_take_several_pictures(klein: BasePipeline) -> None:
    assert klein.abilities().references
    assert not served("flux_kontext").abilities().references
