"""selva.data.memmap.labels: no table holds what MMAudio's reader takes for missing."""

from __future__ import annotations

import pytest

from selva.data.memmap.labels import MISSING_THERE, check_table, is_missing_there, labels_or_fallback


def test_what_pandas_takes_for_missing():
    for text in ("", "nan", "NaN", "null", "NULL", "None", "NA", "N/A", "n/a", "<NA>", "#N/A", "-nan"):
        assert is_missing_there(text)
    for text in ("none", "Null", "na", " ", " NA", "a NaN", "naan", "0"):
        assert not is_missing_there(text)
    assert len(MISSING_THERE) == 19


def test_the_name_of_the_folder_stands_for_a_label_that_cannot_be_read(caplog):
    assert labels_or_fallback([("a", "a dog"), ("b", "")], "dogs") == ["a dog", "dogs"]
    assert "none that MMAudio can read, so the folder's name, 'dogs', is the prompt: 1 of 2 clips" in caplog.text
    assert "b ('')" in caplog.text
    caplog.clear()
    assert labels_or_fallback([("a", "a dog")], "null") == ["a dog"] and not caplog.text
    with pytest.raises(ValueError, match=r"no label that MMAudio can read: c \('NA'\); give .* than 'null'"):
        labels_or_fallback([("c", "NA")], "null")


def test_a_table_with_such_texts_is_refused():
    check_table([("a", "a dog"), ("nan_0", "nannies")], "set")
    with pytest.raises(ValueError, match=r"set: MMAudio's reader takes the ids 'None', 'nan' for missing .*rename"):
        check_table([("nan", "x"), ("None", "y"), ("c", "z")], "set")
    with pytest.raises(ValueError, match=r"set: .*labels of these clips .*: c \('null'\)"):
        check_table([("c", "null")], "set")
