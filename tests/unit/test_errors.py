import inspect
import pickle

import pytest

from serve_app import errors
from serve_app.errors import LoraplexError, OutOfBounds, QueueFull, RefusedAdapter

TREE = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LoraplexError)
]  # fmt: skip


def made(cls: type[LoraplexError]) -> LoraplexError:
    required = {
        name: f"<{name}>"
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    if cls is errors.DeadlineExceeded:
        required = {"limit_s": 3.0}  # type: ignore[dict-item]
    return cls(**required)


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_way_between_processes(cls: type[LoraplexError]) -> None:
    error = made(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert (again.status, again.code) == (error.status, error.code)


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_is_drawn_in_the_tree(cls: type[LoraplexError]) -> None:
    assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_puts_its_fields_into_its_sentence(cls: type[LoraplexError]) -> None:
    sentence = str(made(cls))
    assert sentence
    assert "{" not in sentence


def test_an_error_names_the_thing_and_the_limit() -> None:
    assert str(OutOfBounds("width", 13, "a multiple of 8")) == "'width' is 13, but must be a multiple of 8"
    assert "try again in 4 s" in str(QueueFull(base="b", limit=2, retry_after_s=4))


def test_refusals_of_adapters_share_one_status() -> None:
    assert {cls.status for cls in TREE if issubclass(cls, RefusedAdapter)} == {422}


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in TREE if cls not in (LoraplexError,)]
    assert len(codes) == len(set(codes))
