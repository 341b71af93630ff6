"""selva.training.config: settings that cannot be used."""

from __future__ import annotations

import pytest

from selva import flow
from selva.training.config import TrainConfig


def test_bad_settings_are_reported_together():
    with pytest.raises(ValueError, match=r"steps is 0.*lr is -1.*null_prob is 2.*timestep_mode is 'x'"):
        TrainConfig(steps=0, lr=-1, null_prob=2, timestep_mode="x")
    assert set(flow.TIMESTEP_MODES) == {"logit_normal", "uniform", "curriculum"}
