"""selva.utils.yaml_file: YAML that says what it means, and that which YAML itself would change in silence."""

from __future__ import annotations

import math

import pytest

from selva.utils.errors import UserError
from selva.utils.yaml_file import parse_yaml, read_yaml


@pytest.mark.parametrize("text, expected", [
    ("", None), ("lr: 1e-4\nsteps: 500", {"lr": "1e-4", "steps": 500}), ("a: [-1, +2, 1_000, 0.50, 1.5e+3]", {
        "a": [-1, 2, 1000, 0.5, 1500.0]}),
    ("a: '0500'\nb: \"1:30\"", {"a": "0500", "b": "1:30"}), ("a: .inf\nb: -.inf", {"a": math.inf, "b": -math.inf}),
    ("a: &one {x: 1, y: 2}\nb: {<<: *one, x: 3}\nc: *one", {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {
        "x": 1, "y": 2}}),
])
def test_what_is_clear_is_read(text, expected):
    assert parse_yaml(text, "f") == expected


@pytest.mark.parametrize("text, message", [
    ("a: 1\nsteps: 0500", "f: steps is 0500, which YAML reads as 320; .* (line 2)"),
    ("a:\n- {seed: 1:30}", "f: seed is 1:30, which YAML reads as 90; .* (line 2)"), ("- 0b11", "a value is 0b11, .* 3"),
    ("lr: [1.0, 1:30.5]", "lr is 1:30.5, which YAML reads as 90.5"),
    ("a: 1\nb: {x: 1,\n  'x': 2}\na: 3", "f: x stands in line 2 and again in line 3, .*; a stands in line 1 and"),
    ("{a: 1, a: 2}", "a stands in line 1 and again in line 1"),
])
def test_what_yaml_would_change_or_leave_out_is_refused_with_its_lines(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse_yaml(text, "f")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    for name in ("latin.yaml", "missing.yaml"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as YAML: "):
            read_yaml(tmp_path / name)
