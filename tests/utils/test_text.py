"""Words for messages."""

from __future__ import annotations

import pytest

from selva.utils.text import clock, counted


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1:00 min"), (200, "3:20 min"), (3725, "1:02:05 h")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_one_thing_has_no_plural():
    assert [counted(number, "clip") for number in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]
    assert counted(2, "video or sound", "videos or sounds") == "2 videos or sounds"
