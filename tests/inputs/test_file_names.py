"""selva.inputs.file_names: names that are one file on some systems, or that Windows does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from selva.inputs import file_names
from selva.inputs.file_names import (
    alike,
    from_windows,
    names_that_collide,
    problem_here,
    tells_case_apart,
    windows_problem,
)


@pytest.mark.parametrize("name", ["con", "CON", "aux.npz", "nul.tar.gz", "Com1", "lpt9.flac", "COM\u00b9", "aux .npz"])
def test_names_of_devices_are_known(name):
    assert "device" in str(windows_problem(name))


@pytest.mark.parametrize("name", ["a:b", "what?", "a*", 'say "hi"', "<a>", "a|b", "C:dog.npz"])
def test_characters_that_windows_does_not_have_are_known(name):
    assert "is not allowed in file names on Windows" in str(windows_problem(name))


@pytest.mark.parametrize(
    "name", ["console", "com", "com10", "auxiliary.npz", "Tür & Töne (1).flac", "100 % 'dog' #2", "犬"]
)
def test_other_names_are_good_everywhere(name):
    assert windows_problem(name) is None


def test_a_name_is_judged_by_the_system_it_is_on(monkeypatch):
    monkeypatch.setattr(file_names, "ON_WINDOWS", False)
    assert problem_here("aux") is None and problem_here("what?") is None
    monkeypatch.setattr(file_names, "ON_WINDOWS", True)
    assert "device" in str(problem_here("aux")) and "?" in str(problem_here("what?"))


def test_a_name_has_at_most_255_bytes():
    assert problem_here("ä" * 127 + "b") is None
    assert problem_here("ä" * 128) == "the name has 256 bytes, expected at most 255"


def test_names_that_differ_in_case_or_composition_only_are_alike():
    names = ["dog", "Dog", "cat", "tür", "TU\u0308R", "dog", "DOG"]
    assert alike(names) == [("dog", "Dog"), ("tür", "TU\u0308R"), ("dog", "DOG")]
    assert alike(["dog", "dog_1", "dig"]) == []


def test_a_folder_is_tried_out_and_left_as_it_was(tmp_path, monkeypatch):
    both = (tmp_path / "probe", tmp_path / "PROBE")
    both[0].touch()
    apart = not both[1].exists()
    both[0].unlink()
    assert tells_case_apart(tmp_path / "not" / "there") is apart and not list(tmp_path.iterdir())

    def lexists(path) -> bool:  # as on a disk without case
        return any(entry.name.casefold() == Path(path).name.casefold() for entry in Path(path).parent.iterdir())

    monkeypatch.setattr("selva.inputs.file_names.os.path.lexists", lexists)
    assert not tells_case_apart(tmp_path)


def test_where_nothing_can_be_written_the_system_decides(tmp_path, monkeypatch):
    def refuse(**_options):
        raise PermissionError

    monkeypatch.setattr("selva.inputs.file_names.tempfile.NamedTemporaryFile", refuse)
    for system, expected in (("win32", False), ("darwin", False), ("linux", True)):
        monkeypatch.setattr("selva.inputs.file_names.sys.platform", system)
        assert tells_case_apart(tmp_path) is expected


def test_alike_names_collide_only_where_case_does_not_count(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(file_names, "tells_case_apart", lambda folder: asked.append(folder) or False)
    assert names_that_collide(["dog", "cat"], tmp_path) == [] and not asked  # nothing is tried out for nothing
    assert names_that_collide(["dog", "Dog"], tmp_path) == [("dog", "Dog")] and asked == [tmp_path]
    monkeypatch.setattr(file_names, "tells_case_apart", lambda folder: True)
    assert names_that_collide(["dog", "Dog"], tmp_path) == []


@pytest.mark.parametrize("text, expected", [
    ("raw\\dog.mp4", "raw/dog.mp4"),
    (".\\raw\\..\\dog.mp4", "raw/../dog.mp4"),
    ("raw/dog.mp4", "raw/dog.mp4"),
    ("C:\\raw\\dog.mp4", "C:\\raw\\dog.mp4"),
    ("C:dog.mp4", "C:dog.mp4"),
    ("\\\\server\\share\\dog.mp4", "\\\\server\\share\\dog.mp4"),
])
def test_relative_paths_from_windows(text, expected):
    assert from_windows(text) == expected
