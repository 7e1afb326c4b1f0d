import inspect
import pickle

import pytest

from serve_app import errors, refusals
from serve_app.api.http import origins
from serve_app.errors import LoraplexError, OutOfBounds, QueueFull
from serve_app.redaction import redact_secrets
from serve_app.refusals import RefusedAdapter

MEMBERS = [member for module in (errors, refusals, origins) for member in inspect.getmembers(module, inspect.isclass)]
TREE = list(dict.fromkeys(cls for _, cls in MEMBERS if issubclass(cls, LoraplexError)))


def made(cls: type[LoraplexError]) -> LoraplexError:
    required = {
        name: f"<{name}>"
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    if issubclass(cls, (errors.DeadlineExceeded, errors.BodyTimeout)):
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


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnopqrst", "lpx_-cdefgh_jklmnopqrstuv", "sk-proj-abcdefghijklmnop"])
def test_what_looks_like_a_credential_is_cut_down(secret: str) -> None:
    text = redact_secrets(f"model 'acme/{secret}' is not known")
    assert secret not in text
    assert "acme/" in text
