from __future__ import annotations

import pytest
from typer.testing import CliRunner

from serve_app.cli.main import app


@pytest.mark.parametrize("option", ["--guidance", "--strength"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_that_is_none_is_refused_before_anything_is_asked(option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["generate", "a cat", "-o", "never.png", option, value])
    assert result.exit_code == 2
    assert "finite number" in result.output
