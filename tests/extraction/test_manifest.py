"""The manifest of all clips, from one process or from several that know nothing of each other."""

from __future__ import annotations

import errno
import json
import os
import re
import socket

import pytest

from selva.extraction import manifest
from selva.extraction.manifest import ManifestWriter, Shard, read_manifest
from selva.utils.files import real_path

ROWS = [(name, f"{name}.mp4", 0.0) for name in "abcde"]


def writer_for(folder, shard=None, settings="s", rows=ROWS) -> ManifestWriter:
    return ManifestWriter(folder / "manifest.jsonl", folder / ".extract", rows, settings, shard or Shard())


def do_share(folder, index: int, count: int, **given):
    with writer_for(folder, Shard(index, count), **given) as writer:
        for clip in writer.shard.own(len(writer.rows)):
            writer.record(clip, "done", files=[f"{writer.rows[clip][0]}.npz"], duration_sec=8.0)
        return writer.finish()


def statuses(path) -> str:
    return " ".join(row["status"] for row in read_manifest(path))


def test_every_clip_has_its_line_in_the_order_of_the_list(tmp_path):
    with writer_for(tmp_path) as writer:
        for index in (4, 2, 0, 1):  # order does not matter
            writer.record(index, "done", files=["x.npz"], duration_sec=8.0)
        writer.record(3, "failed", "d.mp4: broken")
        outcome = writer.finish()
    assert outcome.complete and outcome.group_complete and outcome.group_failed == 1 and not outcome.unfinished
    rows = read_manifest(tmp_path / "manifest.jsonl")
    assert [row["id"] for row in rows] == list("abcde")
    assert rows[3] == {"id": "d", "source": "d.mp4", "start_sec": 0.0, "status": "failed", "reason": "d.mp4: broken",
                       "files": [], "duration_sec": None}
    assert rows[0]["files"] == ["x.npz"] and not (tmp_path / "manifest.incomplete.jsonl").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_share_completes_the_manifest(tmp_path, order):
    whole = tmp_path / "whole"
    do_share(whole, 0, 1)
    first = do_share(tmp_path, order[0], 3)
    assert not first.complete and first.unfinished == tuple(sorted(n + 1 for n in order[1:]))
    partial = read_manifest(tmp_path / "manifest.incomplete.jsonl")
    assert {row["id"]: row["status"] for row in partial} == {
        name: "done" if index % 3 == order[0] else "pending" for index, name in enumerate("abcde")}
    assert not (tmp_path / "manifest.jsonl").exists()
    do_share(tmp_path, order[1], 3)
    assert do_share(tmp_path, order[2], 3).complete
    assert (tmp_path / "manifest.jsonl").read_bytes() == (whole / "manifest.jsonl").read_bytes()
    assert not (tmp_path / "manifest.incomplete.jsonl").exists()


def test_a_share_that_is_done_again_takes_its_word_back_first(tmp_path):
    for index in range(2):
        do_share(tmp_path, index, 2)
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with writer_for(tmp_path, Shard(1, 2)) as writer:
        assert not (tmp_path / "manifest.jsonl").exists()
        writer.record(1, "done")  # and then it is killed: neither finished nor closed
    assert not do_share(tmp_path, 0, 2).complete
    assert statuses(tmp_path / "manifest.incomplete.jsonl") == "done done done pending done"
    assert do_share(tmp_path, 1, 2).complete and (tmp_path / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("other", [{"settings": "t"}, {"rows": [*ROWS, ("f", "f.mp4", 0.0)]}])
def test_shares_of_another_list_or_of_other_settings_do_not_count(tmp_path, other):
    do_share(tmp_path, 0, 2)
    outcome = do_share(tmp_path, 1, 2, **other)
    assert outcome.unfinished == (1,)


def test_journals_of_another_number_of_shares_are_cleared_away(tmp_path):
    do_share(tmp_path, 1, 3)
    assert do_share(tmp_path, 0, 1).complete
    assert [path.name for path in (tmp_path / ".extract").glob("*.jsonl")] == ["shard_1_of_1.jsonl"]


def test_a_line_that_a_killed_process_left_unfinished_does_not_count(tmp_path):
    with writer_for(tmp_path, Shard(0, 2)) as writer:
        writer.record(0, "done")
        writer._journal.write('{"index": 2, "status": "do')
    do_share(tmp_path, 1, 2)
    assert statuses(tmp_path / "manifest.incomplete.jsonl") == "done done pending done pending"


def test_processes_of_one_torchrun_share_a_part(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    shard = Shard.of_process(2, 3)
    assert (shard.index, shard.count, shard.group) == (5, 6, range(4, 6)) and list(shard.own(13)) == [5, 11]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert list(Shard.of_process(2, 3).own(8)) == [2, 5] and Shard.of_process().launch == ""


def test_only_processes_that_were_started_together_end_together(tmp_path):
    """One that is still to begin must not be taken for finished because of an earlier run."""
    for launch in ("monday", "tuesday"):
        for index in range(2):
            with writer_for(tmp_path, Shard(index, 2, range(2), launch)) as writer:
                outcome = writer.finish()
            assert outcome.group_complete == (index == 1)


def test_clips_of_a_recording_stay_together():
    keys = ["a", "a", "b", "c", "c", "b"]
    assert [Shard(index, 2).own_groups(keys) for index in range(2)] == [[0, 1, 3, 4], [2, 5]]


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}'])
def test_a_manifest_that_is_none(tmp_path, line):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps({"id": "a", "status": "done"}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_manifest(path)


def test_a_file_of_that_name_by_another_program_is_never_replaced(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio_filepath": "a.wav", "duration": 2.0, "text": "a"}\n', encoding="utf-8")
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: line 1 is no row .*; it is in the way of the"):
        do_share(tmp_path, 0, 1)
    assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]
    path.unlink()
    assert do_share(tmp_path, 0, 1).complete


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [((0, 1), (0, 1)), ((0, 2), (0, 2)), ((0, 2), (0, 1)), ((0, 1), (1, 2))])
def test_two_processes_never_do_the_same_clips(tmp_path, first, second):
    with writer_for(tmp_path, Shard(*first)) as writer:
        writer.record(0, "done")
        with pytest.raises(ValueError, match=f"process {os.getpid()} on {socket.gethostname()} is writing shard"):
            writer_for(tmp_path, Shard(*second))
        for clip in list(writer.shard.own(5))[1:]:
            writer.record(clip, "done")
        outcome = writer.finish()
    assert outcome.complete == (first[1] == 1)
    rows = read_manifest(tmp_path / f"manifest.{'' if outcome.complete else 'incomplete.'}jsonl")
    assert sum(row["status"] == "done" for row in rows) == len(Shard(*first).own(5))
    do_share(tmp_path, *second)  # now that the first has ended


def test_parts_of_one_job_go_on_beside_each_other(tmp_path):
    with writer_for(tmp_path, Shard(0, 2)), writer_for(tmp_path, Shard(1, 2)) as second:
        second.record(1, "done")


def test_a_folder_has_one_name_however_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    rows = [[(name, f"{folder}/{name}.mp4", 0.0) for name in "ab"] for folder in ("clips", f"{tmp_path}/clips")]
    do_share(tmp_path, 0, 2, rows=rows[0])
    assert do_share(tmp_path, 1, 2, rows=rows[1]).complete


@pytest.mark.parametrize("other, said", [
    ({"settings": [{"latents": "True"}, ["x"]]}, "--latents was False there and is True here"),
    ({"settings": [{"latents": "False"}, ["y"]]}, "the prompts"),
    ({"settings": [{"latents": "False"}, ["x"]], "rows": ROWS[:4]}, "number of clips was 5 there and is 4 here"),
    ({"settings": [{"latents": "False"}, ["x"]], "rows": [(a, b, 1.0) for a, b, _ in ROWS]}, "the starts"),
])
def test_the_difference_to_another_part_is_named(tmp_path, caplog, other, said):
    do_share(tmp_path, 0, 2, settings=[{"latents": "False"}, ["x"]])
    do_share(tmp_path, 1, 2, **other)
    assert f"part 1 of 2 was done for other clips or with other settings ({said}" in caplog.text


def test_journals_of_earlier_versions_count(tmp_path):
    """They know the paths as they were given."""
    do_share(tmp_path, 0, 2)
    path = tmp_path / ".extract" / "shard_1_of_2.jsonl"
    header, *rest = path.read_text().splitlines()
    old = {"work_list": manifest._hash([ROWS, "s"]), "shard": 0, "of": 2, "launch": ""}
    assert json.loads(header)["shard"] == 0
    path.write_text("\n".join([json.dumps(old), *rest]) + "\n")
    assert do_share(tmp_path, 1, 2).complete


def test_file_systems_that_cannot_lock_files(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with writer_for(tmp_path), pytest.raises(ValueError, match="is writing shard 1 of 1"):
        writer_for(tmp_path)
    assert "this file system cannot lock files" in caplog.text
    assert do_share(tmp_path, 0, 1).complete


def test_a_link_that_leads_to_itself_ends_nothing(tmp_path):
    """``Path.resolve`` raises a RuntimeError for it, which no caller expects."""
    try:
        (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    except OSError:
        pytest.skip("this system allows no links")
    rows = [("loop", str(tmp_path / "loop.mp4"), 0.0)]
    with ManifestWriter(tmp_path / "manifest.jsonl", tmp_path / ".extract", rows, "s", Shard()) as writer:
        writer.record(0, "failed", "no such file")
        assert writer.finish().complete
    assert real_path(tmp_path / "loop.mp4").name == "loop.mp4"


def test_a_source_whose_name_is_not_utf_8_is_written_as_it_was(tmp_path):
    source = "caf\udce9/a.mp4"
    rows = [("a", source, 0.0), ("b", "b.mp4", 0.0)]
    do_share(tmp_path, 0, 2, rows=rows)
    assert do_share(tmp_path, 1, 2, rows=rows).complete
    assert [row["source"] for row in read_manifest(tmp_path / "manifest.jsonl")] == [source, "b.mp4"]


def test_work_lists_of_earlier_versions_keep_their_hash():
    assert manifest._hash([["a", "caf\u00e9/a.mp4", 0.0]]) == (
        "699fb5cfb225120c63f3f6bd38f696bb4c39b339263e5d4470060fd53881c8c4")
