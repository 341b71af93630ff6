"""Writer of memmaps: what is written, by one process and by several, and what is refused."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from memmap_writing import CLIPS, SMALL, SPAWN, content, digest, do, extract, files, open_writer, published_files

from selva.data.memmap import files as files_module
from selva.data.memmap.reader import MemmapDataset
from selva.data.memmap.writer import MemmapWriter

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("video", [True, False])
def test_tensordict_alone_reads_what_was_written(tmp_path, video):
    from tensordict import TensorDict

    extract(tmp_path / "data", video=video)
    tensors = TensorDict.load_memmap(tmp_path / "data")
    with open(tmp_path / "data.tsv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))

    keys = {"mean", "std", "text_features"} | ({"clip_features", "sync_features"} if video else set())
    assert set(tensors.keys()) == keys and tensors.batch_size == torch.Size([])
    assert [tuple(row.items()) for row in table] == [
        (("id", clip_id), ("label" if video else "caption", text)) for clip_id, text in CLIPS
    ]
    with open_writer(tmp_path / "data", video=video) as writer:
        for row, (clip_id, _) in enumerate(CLIPS):
            for key, expected in content(writer, clip_id).items():
                assert torch.equal(tensors[key][row], expected), (key, clip_id)


def test_the_files_are_those_that_tensordict_writes(tmp_path):
    from tensordict import TensorDict

    extract(tmp_path / "data")
    with open_writer(tmp_path / "data") as writer:
        rows = [content(writer, clip_id) for clip_id, _ in CLIPS]
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    TensorDict(stacked, batch_size=[]).memmap_(tmp_path / "theirs")

    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("data", "theirs"))
    assert json.loads(ours.pop("meta.json")) == json.loads(theirs.pop("meta.json"))
    assert ours == theirs


@pytest.mark.parametrize("video", [True, False])
def test_training_reads_what_was_written(tmp_path, video):
    extract(tmp_path / "data", video=video)
    clips = MemmapDataset(tmp_path / "data", SMALL)
    assert clips.ids == [clip_id for clip_id, _ in CLIPS] and clips.has_video is video
    assert clips.clip(2).prompt == 'says "2"' and torch.isfinite(clips.clip(2).mean).all()


def test_rows_of_any_float_type_are_stored_as_float32(tmp_path):
    with open_writer(tmp_path / "data", CLIPS[:1]) as writer:
        rows = {key: value.bfloat16() for key, value in content(writer, "x").items()}
        rows["mean"] = rows["mean"].mT.contiguous().mT  # in another order in memory
        writer.write(0, rows, "d")
        assert writer.publish_if_complete()
    clip = MemmapDataset(tmp_path / "data", SMALL).clip(0)
    assert torch.equal(clip.mean, rows["mean"].float()) and torch.equal(clip.clip_f, rows["clip_features"].float())


# -- left-out rows -----------------------------------------------------------------------------------------------------


def test_left_out_rows_leave_no_gaps(tmp_path):
    kept = [clip for clip in CLIPS if clip[0] not in ("clip_0", "clip_3", "clip_5")]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    extract(tmp_path / "a" / "data", skipped=("clip_0", "clip_3", "clip_5"))
    extract(tmp_path / "b" / "data", kept)
    gaps, none = files(tmp_path / "a" / "data"), files(tmp_path / "b" / "data")
    for name in ("data.tsv", "data/meta.json", "data/mean.memmap", "data/sync_features.memmap"):
        assert gaps[name] == none[name]


def test_the_next_run_asks_for_a_left_out_row_again(tmp_path):
    extract(tmp_path / "data", skipped=("clip_3",))
    before = files(tmp_path / "data")
    assert extract(tmp_path / "data", skipped=("clip_3",)) == ([], True)
    assert files(tmp_path / "data") == before
    assert extract(tmp_path / "data") == (["clip_3"], True)
    assert MemmapDataset(tmp_path / "data", SMALL).ids == [clip_id for clip_id, _ in CLIPS]


def test_a_row_that_became_unusable_leaves_the_set(tmp_path):
    extract(tmp_path / "data")
    extract(tmp_path / "data", versions={"clip_3": "damaged"}, skipped=("clip_3",))
    assert MemmapDataset(tmp_path / "data", SMALL).ids == [f"clip_{number}" for number in (0, 1, 2, 4, 5)]


def test_a_set_of_nothing_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="none of 6 clips could be used"):
        extract(tmp_path / "data", skipped=dict(CLIPS))
    assert not (tmp_path / "data").exists() and not (tmp_path / "data.tsv").exists()


# -- several processes -------------------------------------------------------------------------------------------------


def work_of_a_rank(folder, rank):
    with open_writer(folder) as writer:
        do(writer, share=range(rank, len(CLIPS), 2))
        writer.publish_if_complete()


def test_two_processes_at_once_write_the_same_files_as_one(tmp_path, one_run):
    ranks = [SPAWN.Process(target=work_of_a_rank, args=(tmp_path / "data", rank)) for rank in (1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert files(tmp_path / "data") == one_run


def test_rows_in_any_order_make_the_same_files(tmp_path, one_run):
    with open_writer(tmp_path / "data") as first, open_writer(tmp_path / "data") as second:
        do(second, share=[5, 1])
        second.flush()
        do(first, share=[4])
        assert not first.publish_if_complete() and first.num_missing == 3
        do(second, share=[3])
        do(first, share=[0, 2])
        second.flush()
        assert first.publish_if_complete()
        assert second.publish_if_complete()
    assert files(tmp_path / "data") == one_run


def test_a_job_array_publishes_with_its_last_job(tmp_path, one_run):
    with open_writer(tmp_path / "data") as writer:
        do(writer, share=range(3))
        assert not writer.publish_if_complete()
    assert not (tmp_path / "data").exists()
    with open_writer(tmp_path / "data") as writer:
        assert do(writer, share=range(3, 6)) == ["clip_3", "clip_4", "clip_5"]
        assert writer.publish_if_complete()
    assert files(tmp_path / "data") == one_run


def test_a_job_array_confirms_every_row_of_a_changed_list(tmp_path):
    """Or the first job would publish rows whose videos have changed, before the job that owns them has looked."""
    extract(tmp_path / "data")
    longer, changed = [*CLIPS, ("clip_6", "new")], {"clip_0": "changed"}
    with open_writer(tmp_path / "data", longer) as writer:
        assert do(writer, longer, share=range(3, 7), versions=changed) == ["clip_6"]
        assert not writer.publish_if_complete() and writer.num_missing == 3
    assert len(MemmapDataset(tmp_path / "data", SMALL)) == 6  # the old set stands
    with open_writer(tmp_path / "data", longer) as writer:
        assert do(writer, longer, share=range(3), versions=changed) == ["clip_0"]
        assert writer.publish_if_complete()
    assert len(MemmapDataset(tmp_path / "data", SMALL)) == 7


def part(folder, share, **work):
    """Run one job of an array; return what it made, and whether the set is published."""
    with open_writer(folder) as writer:
        return do(writer, share=share, **work), writer.publish_if_complete()


def test_a_change_that_one_job_finds_is_not_published_before_all_have_looked(tmp_path):
    """Or half of the rows would be of new videos and half of old ones, if all videos have changed."""
    extract(tmp_path / "data", skipped=("clip_0",))
    before = files(tmp_path / "data")
    changed = {"clip_4": "changed", "clip_1": "changed"}
    assert part(tmp_path / "data", [4, 5], versions=changed) == (["clip_4"], False)
    assert published_files(tmp_path / "data") == before
    assert part(tmp_path / "data", range(4), versions=changed, skipped=("clip_0",)) == (["clip_1"], True)
    assert MemmapDataset(tmp_path / "data", SMALL).ids == [f"clip_{number}" for number in range(1, 6)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("together", [True, False])
def test_whichever_job_finds_the_change_all_that_have_run_count(tmp_path, order, together):
    """Also those that were at their end before it was found, and that have left out rows."""
    extract(tmp_path / "data", skipped=("clip_0",))
    changed, shares = {"clip_4": "changed"}, [range(4), range(4, 6)]
    writers = [open_writer(tmp_path / "data") for _ in shares] if together else []
    for number in order:
        writer = writers[number] if together else open_writer(tmp_path / "data")
        do(writer, share=shares[number], versions=changed, skipped=("clip_0",))
        published = writer.publish_if_complete()
        writer.close()
    assert published
    with open_writer(tmp_path / "data") as writer:
        expected = content(writer, "clip_4", "changed")["mean"]
    rows = MemmapDataset(tmp_path / "data", SMALL)
    assert rows.ids == [f"clip_{number}" for number in range(1, 6)] and torch.equal(rows.clip(3).mean, expected)
    assert not list(tmp_path.glob(".*.confirmed"))


def test_what_was_confirmed_before_all_had_looked_counts_no_more(tmp_path):
    extract(tmp_path / "data")
    for share in (range(3), range(3, 6)):
        assert part(tmp_path / "data", share) == ([], True)
    assert part(tmp_path / "data", range(3), versions={"clip_0": "changed"}) == (["clip_0"], False)
    assert part(tmp_path / "data", range(3, 6)) == ([], True)


def test_what_a_job_of_another_recipe_has_confirmed_does_not_count(tmp_path):
    extract(tmp_path / "data")  # by an earlier version, whose recipe is not known
    with with_recipe(tmp_path / "data", "start 0") as writer:
        assert do(writer, share=range(3)) == [] and writer.publish_if_complete()
    with with_recipe(tmp_path / "data", "start 1") as writer:
        do(writer, share=range(3, 6), versions={clip_id: "start 1" for clip_id, _ in CLIPS})
        assert not writer.publish_if_complete()


def test_an_outdated_row_is_not_published_while_it_is_made_again(tmp_path):
    with open_writer(tmp_path / "data") as writer:
        do(writer)  # and is killed before it publishes
    with open_writer(tmp_path / "data") as first, open_writer(tmp_path / "data") as second:
        assert not first.is_current(0, "another video")
        assert second.is_current(5, digest(CLIPS[5])) and not second.publish_if_complete()
        first.write(0, content(first, "clip_0", "new"), "another video")
        assert first.publish_if_complete() and second.publish_if_complete()
        expected = content(first, "clip_0", "new")["mean"]
    assert torch.equal(MemmapDataset(tmp_path / "data", SMALL).clip(0).mean, expected)


def test_a_row_written_after_others_have_published_is_published_too(tmp_path):
    with open_writer(tmp_path / "data") as first, open_writer(tmp_path / "data") as second:
        do(first, skipped=("clip_2",))
        assert first.publish_if_complete()
        second.write(2, content(second, "clip_2"), digest(CLIPS[2]))
        assert not second.publish_if_complete()  # it has looked at no other row
        assert do(second) == [] and second.publish_if_complete()
    assert len(MemmapDataset(tmp_path / "data", SMALL)) == 6


def test_another_run_with_other_settings_is_refused_while_the_first_lives(tmp_path):
    with open_writer(tmp_path / "data", precision="fp32") as writer:
        do(writer, share=range(2))
        with pytest.raises(ValueError, match=rf"another run .*process {os.getpid()} on .*; wait for its end"):
            open_writer(tmp_path / "data", precision="bf16")
        with pytest.raises(ValueError, match="another run"):
            open_writer(tmp_path / "data", CLIPS[:2], precision="fp32")
        open_writer(tmp_path / "data", precision="fp32").close()  # a helper is welcome
    assert extract(tmp_path / "data", settings={"precision": "bf16"}) == ([clip_id for clip_id, _ in CLIPS], True)


# -- refusals ----------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "missing": (lambda r: r.pop("std"), "clip 'clip_0': std is missing"),
    "unknown": (lambda r: r.update(more=torch.zeros(1)), "clip 'clip_0': more is not part of this set"),
    "shape": (lambda r: r.update(mean=r["mean"][:249]), r"clip 'clip_0': mean is \(249, 20\), expected \(250, 20\)"),
    "batch axis": (lambda r: r.update(mean=r["mean"][None]), r"mean is \(1, 250, 20\)"),
    "nan": (lambda r: r["sync_features"].fill_(torch.nan), "sync_features has 768 values that are not finite"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_refused_by_name(tmp_path, kind):
    spoil, message = BAD_ROWS[kind]
    with open_writer(tmp_path / "data") as writer:
        rows = content(writer, "clip_0")
        spoil(rows)
        with pytest.raises(ValueError, match=message):
            writer.write(0, rows, "d")
        assert writer.num_missing == len(CLIPS)


@pytest.mark.parametrize(("clips", "message"), [
    ([], "no clips to write"),
    ([("a", "x"), ("b", "y"), ("a", "z")], "the id 'a' comes more than once"),
    ([("a", "x"), ("null", "y")], "MMAudio's reader takes the ids 'null' for missing values"),
    ([("a", "x"), ("b", "")], r"takes the labels of these clips for missing values: b \(''\)"),
])
def test_bad_work_lists_are_refused(tmp_path, clips, message):
    with pytest.raises(ValueError, match=message):
        open_writer(tmp_path / "data", clips)


@pytest.mark.parametrize("name", ["data.tsv", "data/mean.memmap"])
def test_files_of_others_are_not_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is in the way"):
        open_writer(tmp_path / "data")
    assert (tmp_path / name).read_text() == "mine"


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process from /proc")
def test_memory_does_not_grow_with_the_set(tmp_path):
    clips = [(f"clip_{number}", "x") for number in range(1000)]  # 60 MB of rows

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with open_writer(tmp_path / "data", clips) as writer:
        rows = content(writer, "x")
        for index in range(20):
            writer.write(index, {key: value.clone() for key, value in rows.items()}, "d")
        before = resident_mb()
        for index in range(20, len(clips)):
            if index == 500:
                writer.skip(index)
            else:
                writer.write(index, {key: value.clone() for key, value in rows.items()}, "d")
        assert writer.publish_if_complete()
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir()) / 2**20
    assert size > 40 and resident_mb() - before < size / 4


# -- what the caller was asked for ------------------------------------------------------------------------------------


def with_recipe(folder: Path, recipe: str) -> MemmapWriter:
    return MemmapWriter(folder, SMALL, CLIPS, video=True, settings={}, recipe=recipe)


@pytest.mark.parametrize("before", ["start 0", ""])
def test_a_part_of_another_recipe_publishes_nothing_alone(tmp_path, before):
    """As ``--start 1 --shard 1/2`` on a finished set: half of the rows would be of second 1, half of second 0."""
    old, new = ({clip_id: version for clip_id, _ in CLIPS} for version in ("start 0", "start 1"))
    with with_recipe(tmp_path / "data", before) as writer:
        do(writer, versions=old)
        assert writer.publish_if_complete()
    finished = files(tmp_path / "data")
    with with_recipe(tmp_path / "data", "start 1") as writer:
        assert len(do(writer, share=range(3), versions=new)) == 3
        assert not writer.publish_if_complete()
    assert published_files(tmp_path / "data") == finished
    with with_recipe(tmp_path / "data", "start 0") as writer:  # another one comes in between: nothing is mixed
        assert do(writer, share=range(3, 6), versions=old) == []
        writer.publish_if_complete()
    assert published_files(tmp_path / "data") == finished
    for share in (range(3), range(3, 6)):
        with with_recipe(tmp_path / "data", "start 1") as writer:
            do(writer, share=share, versions=new)
            published = writer.publish_if_complete()
    assert published and len({float(mean.sum()) for mean in MemmapDataset(tmp_path / "data", SMALL).rows["mean"]}) == 6
    assert files(tmp_path / "data")["data/mean.memmap"] != finished["data/mean.memmap"]


def test_no_table_ever_lies_beside_the_rows_of_another_set(tmp_path, monkeypatch):
    extract(tmp_path / "data")
    renamed = files_module.os.rename

    def rename(source, target):
        renamed(source, target)
        if Path(target) == tmp_path / "data":
            with pytest.raises(FileNotFoundError):
                MemmapDataset(tmp_path / "data", SMALL)
            seen.append(target)

    seen = []
    monkeypatch.setattr(files_module.os, "rename", rename)
    extract(tmp_path / "data", CLIPS[::-1])  # as many rows, in another order
    assert seen and MemmapDataset(tmp_path / "data", SMALL).ids == [clip_id for clip_id, _ in CLIPS[::-1]]
