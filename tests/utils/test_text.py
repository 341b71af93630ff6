"""Words for messages."""

from __future__ import annotations

import pytest

from selva.utils.text import clock


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1:00 min"), (200, "3:20 min"), (3725, "1:02:05 h")])
def test_clock(seconds, text):
    assert clock(seconds) == text
