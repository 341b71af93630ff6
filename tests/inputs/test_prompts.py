"""Lists of prompts: what ends a line, what is a comment, and which names are the same."""

from __future__ import annotations

import json
import logging
import unicodedata

import pytest

from selva.data.folder import scan_folder
from selva.extraction.audio_set import plan_audio_set
from selva.extraction.manifest import read_manifest
from selva.inputs.jobs import collect_jobs
from selva.inputs.prompts import read_all_prompts, read_prompts, read_sidecar
from selva.partition.segments import read_segments
from selva.partition.windows import Window, caption_of, read_captions
from tests.make_data import put_clip

NFC = unicodedata.normalize("NFC", "Café_é")
NFD = unicodedata.normalize("NFD", NFC)
FORMS = [(NFC, NFD), (NFD, NFC)]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\x1c", "\x1d", "\x1e"])
def test_only_line_ends_end_a_line(tmp_path, mark):
    prompt = f"a dog barks,{mark}then: a cat"
    (tmp_path / "p.txt").write_bytes(f"a.npz: {prompt}\r\nb: two\rc: three\n\n".encode())
    assert read_prompts(tmp_path / "p.txt") == {"a.npz": prompt, "b.npz": "two", "c.npz": "three"}


def test_a_name_may_begin_with_a_comment_sign(tmp_path, caplog):
    for name in ("#2 dog", "# 3 dog", "#4"):
        (tmp_path / f"{name}.mp4").touch()
    text = "#2 dog.npz: a dog\n# 3 dog: a cat\n#4: a cow\n#5: old\n# note: old\n#a remark\n"
    (tmp_path / "p.txt").write_text(text)
    with caplog.at_level(logging.WARNING):
        jobs = collect_jobs([tmp_path], prompts=tmp_path / "p.txt", prompt="for all")
    assert {job.id: job.prompt for job in jobs} == {"#2 dog": "a dog", "# 3 dog": "for all", "#4": "a cow"}
    assert "p.txt, line 2: taken for a comment" in caplog.text and "rename the file" in caplog.text
    assert caplog.text.count("WARNING") == 1


def test_what_is_left_out_of_a_list_is_said(tmp_path, caplog):
    (tmp_path / "p.txt").write_text("a dog barks\na: one\nb:\na: two\na: two\n")
    with caplog.at_level(logging.WARNING):
        assert read_prompts(tmp_path / "p.txt") == {"a.npz": "two"}
    for words in ("no colon in it, expected `name.npz: prompt`: line 1", "no prompt after 'b'"):
        assert words in caplog.text


def test_several_lines_of_a_name_are_several_prompts_the_last_of_which_is_its_own(tmp_path):
    (tmp_path / "p.txt").write_text("a: one\nb.npz: x\na: two\na: three\na: two\nb: stem\n")
    found = read_all_prompts(tmp_path / "p.txt")
    assert found == {"a.npz": ("one", "three", "two"), "b.npz": ("x",)}
    assert read_prompts(tmp_path / "p.txt") == {"a.npz": "two", "b.npz": "x"}
    (tmp_path / "a.txt").write_text("\ufeff a dog  barks\r\n\nbarking\n\n", encoding="utf-8")
    assert read_sidecar(tmp_path / "a.txt") == ("a dog barks", "barking")
    (tmp_path / "a.txt").write_text(" \n\n")
    assert read_sidecar(tmp_path / "a.txt") == ()


def test_clips_keep_their_other_prompts(tmp_path, caplog):
    for stem in ("a", "b", "c"):
        (tmp_path / f"{stem}.mp4").touch()
    (tmp_path / "p.txt").write_text("a: one\na: two\na: three\nb: only\n")
    (tmp_path / "c.txt").write_text("beside\nbelow\n")
    with caplog.at_level(logging.INFO):
        jobs = collect_jobs([tmp_path], prompts=tmp_path / "p.txt")
    assert [(job.prompt, job.other_prompts) for job in jobs] == [
        ("three", ("one", "two")), ("only", ()), ("below", ("beside",))]
    assert "2 clips have several prompts" in caplog.text and "a, c" in caplog.text


@pytest.mark.parametrize(("on_disk", "written"), FORMS)
def test_names_of_clips_are_compared_in_one_form(tmp_path, caplog, on_disk, written):
    (tmp_path / f"{on_disk}.mp4").touch()
    (tmp_path / "p.txt").write_text(f"{written}: a dog\n", encoding="utf-8")
    (tmp_path / "t.tsv").write_text(f"id\tpath\tprompt\n{written}\t\t\nx\t{written}.mp4\t\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        (job,) = collect_jobs([tmp_path], prompts=tmp_path / "p.txt")
        assert job.prompt == "a dog"
        assert [one.path for one in collect_jobs([tmp_path / "t.tsv"])] == [tmp_path / f"{on_disk}.mp4"] * 2
        (tmp_path / f"{written}.txt").write_text("a cat")
        assert collect_jobs([tmp_path])[0].prompt == "a cat"
    assert not caplog.text


@pytest.mark.parametrize(("on_disk", "written"), FORMS)
def test_names_in_a_data_folder_are_compared_in_one_form(tmp_path, caplog, on_disk, written):
    put_clip(tmp_path, on_disk)
    (tmp_path / f"{on_disk}.wav").rename(tmp_path / f"{written}.wav")
    (tmp_path / "prompts.txt").write_text(f"{written}: a dog\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        scan = scan_folder(tmp_path)
    assert [clip.prompt for clip in scan.clips] == ["a dog"] and not scan.skipped and not caplog.text


@pytest.mark.parametrize(("on_disk", "written"), FORMS)
def test_names_of_recordings_are_compared_in_one_form(tmp_path, on_disk, written):
    (tmp_path / "c.tsv").write_text(f"id\tcaption\n{written}\ta dog\n", encoding="utf-8")
    assert caption_of(Window(f"{on_disk}_0", on_disk, 0, 1), read_captions(tmp_path / "c.tsv")) == "a dog"
    (tmp_path / "s.tsv").write_text(f"name\tstart\tend\n{written}\t0\t1\n", encoding="utf-8")
    assert list(read_segments([tmp_path / "s.tsv"], {on_disk: tmp_path / "on_disk.wav"})) == [on_disk]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / f"{on_disk}.wav").touch()
    (tmp_path / "w.tsv").write_text(f"id\tname\tstart_sample\tend_sample\nx\t{written}\t0\t9\n", encoding="utf-8")
    (job,) = plan_audio_set(tmp_path / "w.tsv", tmp_path / "c.tsv", tmp_path / "r")
    assert (job.path, job.caption, job.problem) == (tmp_path / "r" / f"{on_disk}.wav", "a dog", "")


def test_a_manifest_with_such_a_prompt_is_read(tmp_path):
    row = {"id": "a", "status": "done", "prompt": "a dog barks,\u2028then\x85a cat"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_manifest(tmp_path / "manifest.jsonl") == [row]


def test_a_manifest_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.jsonl: line 1 is not JSON"):
        read_manifest(tmp_path / "manifest.jsonl")


def test_a_name_with_and_without_its_ending_is_one(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a.npz: one\na: two\nb: same\nb.npz: same\n")
    assert read_prompts(tmp_path / "prompts.txt") == {"a.npz": "one", "b.npz": "same"}
    assert "of which those of the name with .npz count: a.npz\n" in caplog.text
