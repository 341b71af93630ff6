"""selva.partition.captioning.sidecars: captions are written where they are read, and what a user wrote stays."""

from __future__ import annotations

import pytest

from selva.inputs.prompts import read_prompts
from selva.partition.captioning.sidecars import CaptionFiles
from selva.partition.pieces import WrittenFiles
from selva.utils.errors import UserError


def files(folder, prompts=None) -> CaptionFiles:
    return CaptionFiles(WrittenFiles(folder, "captions"), prompts)


def test_a_text_is_replaced_only_as_long_as_nobody_has_touched_it(tmp_path, caplog):
    clip, note = tmp_path / "dog.mp4", tmp_path / "dog.txt"
    assert files(tmp_path).write(clip, "a dog") == "written" and note.read_text() == "a dog\n"
    assert files(tmp_path).write(clip, "a dog") == "as before"
    assert files(tmp_path).write(clip, "a wolf") == "written" and note.read_text() == "a wolf\n"
    note.write_text("a small dog\n")
    edited = files(tmp_path)
    assert edited.write(clip, "a fox") == "kept" and note.read_text() == "a small dog\n"
    edited.close()
    assert "have a caption of yours: dog" in caplog.text
    note.write_text("a fox\n")  # the same by chance
    assert files(tmp_path).write(clip, "a fox") == "as before"


def test_several_captions_of_a_user_stay(tmp_path):
    clip, note = tmp_path / "dog.mp4", tmp_path / "dog.txt"
    assert files(tmp_path).write(clip, "a dog") == "written"
    note.write_text("a small dog\na dog\n")  # the last of which is the caption
    assert files(tmp_path).write(clip, "a dog") == "kept"
    assert note.read_text() == "a small dog\na dog\n"


def test_a_text_that_was_there_before_is_kept_an_empty_one_too(tmp_path):
    (tmp_path / "dog.txt").write_text("")
    assert files(tmp_path).write(tmp_path / "dog.wav", "a dog") == "kept"
    assert (tmp_path / "dog.txt").read_text() == ""


def test_lines_of_a_prompts_txt_stay_and_new_ones_are_added(tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\ndog.npz: my dog")  # no line break at the end
    (tmp_path / "#2.flac").touch()
    out = files(tmp_path, prompts)
    assert out.write(tmp_path / "dog.flac", "a dog") == "kept"
    assert out.write(tmp_path / "cat.flac", "a cat: small") == "written"
    assert out.write(tmp_path / "#2.flac", "a bird") == "written"
    assert prompts.read_text() == "# mine\ndog.npz: my dog"  # written whole, in the end
    out.close()
    assert prompts.read_text().startswith("# mine\ndog.npz: my dog\ncat.npz: ")
    assert read_prompts(prompts, ["#2.npz"]) == {"dog.npz": "my dog", "cat.npz": "a cat: small", "#2.npz": "a bird"}
    again = files(tmp_path, prompts)
    assert again.write(tmp_path / "cat.flac", "a cat: small") == "as before"
    assert again.write(tmp_path / "#2.flac", "a bird") == "as before"
    assert not (tmp_path / "cat.txt").exists()


def test_names_that_cannot_stand_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="a colon"):
        files(tmp_path, tmp_path / "prompts.txt").write(tmp_path / "12:30.flac", "a dog")
    with pytest.raises(UserError, match=r"would be called prompts\.txt"):
        files(tmp_path).write(tmp_path / "prompts.mp4", "a dog")
    (tmp_path / "prompts.txt").write_text("dog.npz: ü\n", encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        files(tmp_path, tmp_path / "prompts.txt")
