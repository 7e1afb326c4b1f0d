from __future__ import annotations

import json
import re

import yaml
from typer.testing import CliRunner

from serve_app.cli.main import app
from serve_app.config import AuthSettings, digest_of


def test_a_key_comes_with_the_very_line_for_the_configuration() -> None:
    outcome = CliRunner().invoke(app, ["key", "new", "alice", "--admin"])
    assert outcome.exit_code == 0, outcome.output
    line = re.search(r"- \{.*\}", outcome.output)
    made = re.search(r"lpx_\S+", outcome.output)
    assert line is not None
    assert made is not None
    (entry,) = AuthSettings.model_validate({"keys": yaml.safe_load(line.group())}).keys
    assert (entry.name, entry.sha256, entry.admin) == ("alice", digest_of(made.group()), True)
    assert outcome.output.count(made.group()) == 1


def test_no_two_keys_are_alike() -> None:
    made = [json.loads(CliRunner().invoke(app, ["key", "new", "bob", "--json"]).output) for _ in range(3)]
    assert len({one["key"] for one in made}) == 3
    assert all(len(one["key"]) > 40 for one in made)
    assert made[0]["admin"] is False
    assert made[0]["sha256"] == digest_of(made[0]["key"])


def test_a_name_that_logs_could_not_hold_is_refused() -> None:
    outcome = CliRunner().invoke(app, ["key", "new", "two words"])
    assert outcome.exit_code == 1
    assert "cannot be a key's name" in outcome.output
    assert "lpx_" not in outcome.output
