"""selva.training.config: settings that cannot be used."""

from __future__ import annotations

import pytest

from selva import flow
from selva.training.config import RunConfig, TrainConfig
from selva.utils.errors import UserError


def test_bad_settings_are_reported_together():
    with pytest.raises(ValueError, match=r"steps is 0.*lr is -1.*null_prob is 2.*timestep_mode is 'x'"):
        TrainConfig(steps=0, lr=-1, null_prob=2, timestep_mode="x")
    assert set(flow.TIMESTEP_MODES) == {"logit_normal", "uniform", "curriculum"}


@pytest.fixture
def folders(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    return [str(tmp_path / name) for name in "abc"]


def test_prefixes_are_one_for_all_or_one_for_each(folders):
    assert RunConfig(data_dir=folders).prefixes(3) == ["", "", ""]
    assert RunConfig(data_dir=folders, prompt_prefix=("sks",), val_dir=folders[0]).prefixes(1) == ["sks"]
    assert RunConfig(data_dir=folders, prompt_prefix=("a", "", "c")).prefixes(3) == ["a", "", "c"]
    with pytest.raises(UserError, match="prompt_prefix has 2 texts and data_dir 3 sets; give one text for all"):
        RunConfig(data_dir=folders, prompt_prefix=("a", "b"))
    with pytest.raises(UserError, match="a text for each of 3 data sets and val_dir 1 folder"):
        RunConfig(data_dir=folders, prompt_prefix=("a", "b", "c"), val_dir=folders[0])
    with pytest.raises(UserError, match="balance is 'all', expected one of clips, sets"):
        RunConfig(data_dir=folders, balance="all")


@pytest.mark.parametrize("given, count", [(None, 0), ((), 0), ("a", 1), (["a", "b"], 2)])
def test_folders_to_hold_out_may_be_none_one_or_several(folders, given, count):
    """Earlier versions wrote null, or one path, into config.yaml."""
    given = [folders["ab".index(name)] for name in given] if isinstance(given, list) else given and folders[0]
    assert len(RunConfig(data_dir=folders, val_dir=given or None).val_dir) == count
