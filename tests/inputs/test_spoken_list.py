"""Lists as LJSpeech has them: what is one, and that what is unclear in one is said."""

from __future__ import annotations

import pytest

from selva.inputs.prompts import read_prompts
from selva.inputs.spoken_list import is_spoken_list, read_spoken_list
from selva.partition.windows import read_captions

LIST = 'LJ001-0001|the year 1455|the year fourteen fifty-five\n\nLJ001-0002|"quoted, once|\n'


@pytest.mark.parametrize("text, expected", [
    (LIST, True), ("a|b\n", True), ("id\tcaption\na\tb | c\n", False), ("id,caption\na,b|c\n", False),
    ("dog.npz: a dog | a cat\n", False), ("# a | b\n", False), ("|a\n", False), ("a|b|c|d\n", False), ("", False),
])
def test_what_is_such_a_list(tmp_path, text, expected):
    (tmp_path / "metadata.csv").write_text(text)
    assert is_spoken_list(tmp_path / "metadata.csv") is expected


def test_it_is_read_as_captions_and_as_prompts(tmp_path):
    (tmp_path / "metadata.csv").write_text(LIST)
    first, second = "the year fourteen fifty-five", '"quoted, once'
    assert read_captions(tmp_path / "metadata.csv") == {"LJ001-0001": first, "LJ001-0002": second}
    assert read_prompts(tmp_path / "metadata.csv") == {"LJ001-0001.npz": first, "LJ001-0002.npz": second}


def test_all_that_is_unclear_is_named_with_its_line(tmp_path):
    (tmp_path / "metadata.csv").write_text("a|one\nb\na|two\n|three\nc|1|2|3\n")
    with pytest.raises(ValueError) as caught:
        read_spoken_list(tmp_path / "metadata.csv")
    for text in ("metadata.csv: line 2 has 1 part;", "line 3: 'a' was given in line 1 already", "line 4 has 2 parts",
                 "line 5 has 4 parts", "expected `id|text`"):
        assert text in str(caught.value)
