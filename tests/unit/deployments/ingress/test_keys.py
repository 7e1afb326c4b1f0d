from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import ApiKey, AuthSettings
from serve_app.deployments.ingress.keys import KeyFileInvalid, Keys

ONE, TWO = {"name": "one", "sha256": "1" * 64}, {"name": "two", "sha256": "2" * 64, "admin": True}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def write(path: Path, content: object) -> None:
    text = content if isinstance(content, str) else yaml.safe_dump({"keys": content})
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def names(keys: Keys) -> list[str]:
    return [key.name for key in keys()]


def test_keys_of_the_configuration_and_of_a_file_count_together(tmp_path: Path) -> None:
    write(tmp_path / "keys.yaml", [TWO])
    settings = AuthSettings(keys=(ApiKey.model_validate(ONE),), keys_file=tmp_path / "keys.yaml")
    assert names(Keys(settings, clock=Clock())) == ["one", "two"]
    assert names(Keys(AuthSettings(), clock=Clock())) == []


def test_a_key_that_is_given_or_taken_counts_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, [ONE])
    keys = Keys(AuthSettings(keys_file=path), clock=Clock())
    write(path, [ONE, TWO])
    assert names(keys) == ["one", "two"]
    write(path, [TWO])
    assert names(keys) == ["two"]


@pytest.mark.parametrize(
    "content",
    ["", "keys: []", "keys:", "[", "other: 1", "- a", f"keys: [{{name: one, sha256: {'x' * 64}}}]",
     f"keys: [{{name: one, sha256: {'1' * 64}, adm: true}}]",
     f"keys: [{{name: one, sha256: '{'1' * 64}'}}, {{name: two, sha256: '{'1' * 64}'}}]"],
)  # fmt: skip
def test_a_damaged_file_never_opens_the_service(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.yaml"
    write(path, [ONE])
    settings = AuthSettings(keys_file=path)
    keys = Keys(settings, clock=Clock())
    write(path, content)
    assert names(keys) == ["one"]
    path.unlink()
    assert names(keys) == ["one"]
    write(path, content)
    with pytest.raises(KeyFileInvalid) as refusal:
        Keys(settings, clock=Clock())
    assert "1111" not in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_a_service_does_not_start_without_the_file_that_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(KeyFileInvalid, match="cannot be read"):
        Keys(AuthSettings(keys_file=tmp_path / "none.yaml"), clock=Clock())


@pytest.mark.parametrize(
    "keys", [[ONE, {**TWO, "name": "one"}], [ONE, {**TWO, "sha256": "1" * 64}], [{**ONE, "sha256": "1" * 63}]]
)
def test_keys_that_cannot_be_told_apart_are_refused(keys: list[dict[str, object]]) -> None:
    with pytest.raises(ValidationError):
        AuthSettings.model_validate({"keys": keys})


def test_a_key_has_the_weight_that_it_was_given() -> None:
    settings = AuthSettings(keys=(ApiKey.model_validate(ONE), ApiKey.model_validate(TWO | {"weight": 4})))
    keys = Keys(settings, clock=Clock())
    assert [keys.weight_of(name) for name in ("one", "two", "gone", None)] == [1.0, 4.0, 1.0, 1.0]
