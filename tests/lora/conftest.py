"""A small model with layers of every kind, and an input for it."""

from __future__ import annotations

import pytest
from lora_toy import Toy, make_input, make_toy
from torch import Tensor


@pytest.fixture
def model() -> Toy:
    return make_toy()


@pytest.fixture
def x() -> Tensor:
    return make_input()
