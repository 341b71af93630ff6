"""selva.data.content: what has changed between two runs on the same names."""

from __future__ import annotations

import pytest
import torch
from small_run import make_clips

from selva.data.content import content_changes, content_state
from selva.data.dataset import ListDataset
from selva.utils.torch_files import check_plain


class Described(ListDataset):
    """Clips with given hashes of their content."""

    def __init__(self, names, **changed):
        super().__init__(make_clips(1) * len(names))
        self.names, self.changed = names, changed

    @property
    def ids(self):
        return self.names

    def content(self, index):
        name = self.names[index]
        values = {"features": "f", "sound": "s", "latents": "l", "prompt": "p", "windows": "w"}
        changed = self.changed if name == "b" else {}
        return {key: f"{value} {name} {changed.get(key, '')}" for key, value in values.items()}


def changes(before, now):
    return content_changes(content_state(before), content_state(now))


def test_equal_content_has_no_changes():
    assert changes(Described(["a", "b"]), Described(["a", "b"])) == []
    state = content_state(Described(["a", "b"]))
    check_plain(state, "state")
    assert state["hashes"].shape == (2, 5) and state["hashes"].dtype == torch.int64


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"features": "x"}, ["other features: b"]),
        ({"sound": "x", "latents": "x"}, ["another sound: b"]),
        ({"prompt": "x"}, ["another prompt: b"]),
        ({"windows": "x", "latents": "x"}, ["another length or other windows (--duration): b"]),
        ({"sound": "x"}, []),  # other tags, or another format without loss
        ({"latents": "x"}, []),  # computed on another device
    ],
)
def test_what_has_changed_is_named(changed, expected):
    assert changes(Described(["a", "b"]), Described(["a", "b"], **changed)) == expected


def test_other_clips_are_named():
    assert changes(Described(["a", "b", "c"]), Described(["a", "d", "c"])) == ["new: d", "gone: b"]
    assert changes(Described(["a", "b"]), Described(["b", "a"])) == ["the same clips in another order or number"]
    many = [f"n{i}" for i in range(9)]
    assert changes(Described(["a"]), Described(["a", *many])) == ["new: n0, n1, n2, n3, n4 and 4 more"]


def test_what_is_unknown_is_not_compared():
    assert changes(ListDataset(make_clips(2)), ListDataset(make_clips(2))) == []
