"""The contact sheet of the embedded models."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.demo.embedded import STYLE_NAMES
from serve_app.demo.sheet import PROMPTS, contact_sheet


@pytest.mark.slow
def test_the_sheet_shows_every_style_unlike_the_base() -> None:
    pixels = np.asarray(contact_sheet()).astype(np.int16)

    rows = sum(len(prompts) for prompts in PROMPTS.values())
    tiles = pixels[24 : 24 + rows * 134, 190:].reshape(rows, 134, len(STYLE_NAMES) + 1, 134, 3)
    for column in range(1, len(STYLE_NAMES) + 1):
        assert np.abs(tiles[:, :, column] - tiles[:, :, 0]).mean() > 4
