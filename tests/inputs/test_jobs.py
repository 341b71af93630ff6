"""Clips that are made of videos, folders and tables: their names and their prompts."""

from __future__ import annotations

import logging
from pathlib import Path

import av
import pytest
from make_media import make_video

from selva.inputs.jobs import ClipJob, collect_jobs, find_videos, window_starts


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def ids(jobs: list[ClipJob]) -> list[str]:
    return [job.id for job in jobs]


def write_table(path: Path, *rows: str) -> Path:
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


# -- videos and folders ------------------------------------------------------------------------------------------------


def test_videos_and_folders_keep_the_order_of_the_inputs(tmp_path):
    touch(tmp_path / "f" / "b.mp4", tmp_path / "f" / "a.MKV", tmp_path / "f" / "._a.mp4", tmp_path / "f" / "notes.doc",
          tmp_path / "z.strange", tmp_path / "f" / "sub" / "c.mp4", tmp_path / "f" / ".cache" / "d.mp4")
    jobs = collect_jobs([tmp_path / "z.strange", tmp_path / "f"], prompt="a dog", start_sec=1.0, duration_sec=4.0)
    assert jobs == [
        ClipJob("z", tmp_path / "z.strange", 1.0, 4.0, "a dog"),
        ClipJob("a", tmp_path / "f" / "a.MKV", 1.0, 4.0, "a dog"),
        ClipJob("b", tmp_path / "f" / "b.mp4", 1.0, 4.0, "a dog"),
    ]
    assert ids(collect_jobs([tmp_path / "f"], recursive=True)) == ["a", "b", "sub_c"]


def test_equal_names_in_subfolders_are_different_clips(tmp_path):
    """Pitfall J4: named by the stem alone, one would overwrite the other."""
    touch(tmp_path / "a" / "dog.mp4", tmp_path / "b" / "dog.mp4", tmp_path / "b" / "deep" / "dog.mp4")
    jobs = collect_jobs([tmp_path], recursive=True)
    assert {job.id: job.path.relative_to(tmp_path).as_posix() for job in jobs} == {
        "a_dog": "a/dog.mp4", "b_deep_dog": "b/deep/dog.mp4", "b_dog": "b/dog.mp4",
    }
    assert [path.name for path in find_videos(tmp_path / "b")] == ["dog.mp4"]


def test_two_clips_of_one_name_are_refused_and_the_same_video_twice_is_done_once(tmp_path, caplog):
    touch(tmp_path / "dog.mp4", tmp_path / "dog.mov", tmp_path / "a_b.mp4", tmp_path / "a" / "b.mp4")
    with pytest.raises(ValueError, match=r"a/b\.mp4.*a_b\.npz.*dog\.mov and .*dog\.mp4 would both become dog\.npz"):
        collect_jobs([tmp_path], recursive=True)
    with caplog.at_level(logging.WARNING):
        assert ids(collect_jobs([tmp_path / "dog.mp4", tmp_path / "a" / ".." / "dog.mp4"])) == ["dog"]
    assert "done once" in caplog.text


def test_requests_that_make_no_sense(tmp_path):
    touch(tmp_path / "sub" / "a.mp4")
    with pytest.raises(ValueError, match="at least one video"):
        collect_jobs([])
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        collect_jobs([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"no videos in this folder \(its subfolders .*; --recursive does\)"):
        collect_jobs([tmp_path])
    with pytest.raises(ValueError, match=r"start is -1 s.*; duration is 0\.5 s, expected at least 0\.64"):
        collect_jobs([tmp_path / "sub"], start_sec=-1, duration_sec=0.5)
    with pytest.raises(ValueError, match="overlap is 8 s, expected 0 to less than the 8 s"):
        collect_jobs([tmp_path / "sub"], windows=True, overlap_sec=8)
    with pytest.raises(ValueError, match="only windows overlap"):
        collect_jobs([tmp_path / "sub"], overlap_sec=1)
    with pytest.raises(ValueError, match="name of the clips is empty"):
        collect_jobs([tmp_path / "sub"], name="")
    with pytest.raises(ValueError, match="an id has at most 200 bytes"):
        collect_jobs([tmp_path / "sub"], name="x" * 200)


def test_names_are_numbered_in_order_and_again_the_same(tmp_path):
    touch(tmp_path / "b.mp4", tmp_path / "a.mp4", tmp_path / "c.mp4")
    for _ in range(2):
        jobs = collect_jobs([tmp_path], name="big/dog")
        assert [(job.id, job.path.name) for job in jobs] == [
            ("big_dog_001", "a.mp4"), ("big_dog_002", "b.mp4"), ("big_dog_003", "c.mp4"),
        ]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_table_says_everything_about_a_clip(tmp_path, caplog):
    touch(tmp_path / "raw" / "long.mp4", tmp_path / "dog_1.mov", tmp_path / "dog_1.avi", tmp_path / "m.png")
    table = write_table(
        tmp_path / "clips.tsv",
        "\ufeffid\tlabel\tpath\tstart\tduration\tmask\tprompt\tspeed",
        "dog_2\tbark\traw/long.mp4\t12.5\t4\tm.png\ta dog, barking: loud\t3",
        "dog_1\thowl\t\t\t\t\t\t",
    )
    with caplog.at_level(logging.WARNING):
        jobs = collect_jobs([table], start_sec=1.0)
    assert jobs == [
        ClipJob("dog_2", tmp_path / "raw" / "long.mp4", 12.5, 4.0, "a dog, barking: loud", "bark", tmp_path / "m.png"),
        ClipJob("dog_1", tmp_path / "dog_1.mov", 1.0, 8.0, "howl", "howl"),
    ]
    assert caplog.text.count("columns not used: speed") == 1


def test_csv_captions_and_another_folder_of_videos(tmp_path):
    touch(tmp_path / "videos" / "x.webm", tmp_path / "videos" / "y.mp4")
    table = write_table(tmp_path / "clips.csv", " Caption, ID,path", '"rain, on tin",x,', "wind,y2,y.mp4")
    jobs = collect_jobs([table], video_dir=tmp_path / "videos")
    assert [(job.id, job.path.name, job.prompt) for job in jobs] == [
        ("x", "x.webm", "rain, on tin"), ("y2", "y.mp4", "wind"),
    ]


BAD_ROWS = {
    "../../x\t\t\t": r"line 2: id '../../x': an id is a file name, not a path",
    "/etc/passwd\t\t\t": "line 2: id '/etc/passwd': an id is a file name",
    "a\\b\t\t\t": "line 2: .*not a path",
    "..\t\t\t": "line 2: .*hidden",
    "a\x07b\t\t\t": "line 2: .*control characters",
    "\t5\t\t": "line 2: .*the id is empty",
    "a\t-1\t\t": "line 2: start is '-1', expected seconds, 0 or more",
    "a\t9,500\t\t": "line 2: start is '9,500', expected 9.500 or 9500; write the one that is meant",
    "a\tsoon\t\t": "line 2: start is 'soon'",
    "a\tnan\t\t": "line 2: start is 'nan'",
    "a\t\t0.5\t": "line 2: duration is '0.5', expected seconds, 0.64 or more",
    "a\t\tinf\t": "line 2: duration is 'inf'",
    "a\t\t\t\t\t": "line 2: more cells than columns",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_are_named(row, tmp_path):
    touch(tmp_path / "a.mp4")
    table = write_table(tmp_path / "clips.tsv", "id\tstart\tduration\tpath", row)
    with pytest.raises(ValueError, match=rf"clips\.tsv: {BAD_ROWS[row]}"):
        collect_jobs([table])


def test_rows_and_columns_that_a_spreadsheet_leaves_empty_are_none(tmp_path, caplog):
    touch(tmp_path / "a.mp4", tmp_path / "b.mp4")
    table = write_table(tmp_path / "t.csv", "id;prompt;;", "a;x;;", ";;;", "b;y;;", ";  ;;")
    assert [(job.id, job.prompt) for job in collect_jobs([table])] == [("a", "x"), ("b", "y")]
    assert "columns not used" not in caplog.text


@pytest.mark.parametrize("sign", [";", ",", "\t"])
def test_a_first_line_that_tells_excel_the_delimiter_is_no_header(sign, tmp_path):
    touch(tmp_path / "a.mp4")
    table = write_table(tmp_path / "t.csv", f"sep={sign}", f"id{sign}prompt", f"a{sign}x")
    assert [(job.id, job.prompt) for job in collect_jobs([table])] == [("a", "x")]
    table = write_table(tmp_path / "t.csv", f"sep={sign}", f"id{sign}start", f"a{sign}soon")
    with pytest.raises(ValueError, match="line 3: start is 'soon'"):
        collect_jobs([table])


def test_an_id_with_several_videos_is_not_guessed_without_a_word(tmp_path, caplog):
    touch(tmp_path / "dog.mov", tmp_path / "dog.MP4", tmp_path / "cat.mp4")
    table = write_table(tmp_path / "t.tsv", "id\tpath", "dog\t", "cat\t")
    assert [job.path.name for job in collect_jobs([table])] == ["dog.MP4", "cat.mp4"]
    assert "line 2: id 'dog' is the name of several videos; taken: dog.MP4, not dog.mov; a column path" in caplog.text
    caplog.clear()
    table = write_table(tmp_path / "t.tsv", "id\tpath", "dog\tdog.mov", "cat\t")
    assert [job.path.name for job in collect_jobs([table])] == ["dog.mov", "cat.mp4"] and not caplog.text


def test_all_problems_of_a_table_come_together(tmp_path):
    table = write_table(tmp_path / "clips.tsv", "id\tstart\tpath", "a\t0\t", "../b\tx\t", "a\t1\t", "c\t0\tv\0.mp4")
    with pytest.raises(ValueError) as error:
        collect_jobs([table])
    for text in ("line 3: id '../b'", "line 3: start is 'x'", "line 4: id 'a' was given in line 2", "line 5: path has"):
        assert text in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_as_excel_and_windows_write_it(tmp_path, encoding):
    """Semicolons, UTF-16 ("Unicode text"), and folders with backslashes."""
    video = tmp_path / "Montag" / "Bello.MP4"
    touch(video)
    text = "id;path;prompt\r\nb\u00e4r;Montag\\Bello.MP4;a dog, barking\r\n"
    (tmp_path / "clips.csv").write_bytes(text.encode(encoding))
    (job,) = collect_jobs([tmp_path / "clips.csv"])
    assert (job.id, job.path, job.prompt) == ("b\u00e4r", video, "a dog, barking")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_as_windows_writes_them(tmp_path, encoding):
    touch(tmp_path / "a.mp4")
    (tmp_path / "prompts.txt").write_bytes("a: a d\u00f6g\r\n".encode(encoding))
    (job,) = collect_jobs([tmp_path], prompts=tmp_path / "prompts.txt")
    assert job.prompt == "a d\u00f6g"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name\tlabel\na\tb\n", r"column id missing \(found: name, label\)"),
        (b"", r"column id missing \(found: nothing"),
        (b"id   path\na    a.mp4\n", "found: id   path.*; columns are separated by tabs, .* not by spaces"),
        (b"id\n", "has no rows"),
        (b"id\na\nb\xe4r\n", r"line 3: is not UTF-8 text; save it as UTF-8 \(Notepad"),
        (b'id\tlabel\na\tb\nc\t"hello" he said\n', "after line 2 no row can be read"),
        (b"id\tlabel\tLabel\na\tb\tc\n", "column label is there more than once"),
    ],
)
def test_what_is_no_table(content, message, tmp_path):
    (tmp_path / "clips.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        collect_jobs([tmp_path / "clips.tsv"])


def test_a_missing_video_is_said_at_once_and_stays_in_the_list(tmp_path, caplog):
    touch(tmp_path / "a.mp4")
    table = write_table(tmp_path / "clips.tsv", "id\tmask", "a\tm.png", "b\t")
    with caplog.at_level(logging.WARNING):
        assert ids(collect_jobs([table])) == ["a", "b"]
    assert "missing videos, whose clips will fail" in caplog.text and "b.mp4" in caplog.text
    assert "missing masks, whose clips will fail" in caplog.text and "m.png" in caplog.text
    with pytest.raises(FileNotFoundError, match="none of the 2 videos exists"):
        collect_jobs([table], video_dir=Path(__file__).parent)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_names_of_videos_in_a_list_of_prompts_are_said_to_be_none(tmp_path, caplog):
    touch(tmp_path / "a b.MP4", tmp_path / "c.mp4")
    prompts = tmp_path / "list.txt"
    prompts.write_text("a b.MP4: a dog\nc.npz: a cat\n")
    assert [job.prompt for job in collect_jobs([tmp_path], prompts=prompts)] == ["", "a cat"]
    assert "those of feature files (a b.npz for a b.MP4), so these prompts are not used: a b.MP4" in caplog.text


def test_the_more_specific_prompt_wins(tmp_path, caplog):
    videos = [tmp_path / f"{stem}.mp4" for stem in "abcdef"]
    touch(*videos)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a.npz: list\nb.npz: list\nghost.npz: nobody\n")
    for stem in "abc":
        (tmp_path / f"{stem}.txt").write_text("\ufeff  beside \t the video\n", encoding="utf-8")
    (tmp_path / "f.txt").write_text("\n")
    table = write_table(tmp_path / "t.tsv", "id\tlabel\tprompt", "a\tlabel\ttable", *(f"{s}\tlabel\t" for s in "bcdef"))
    with caplog.at_level(logging.INFO):
        jobs = collect_jobs([table], prompts=prompts, prompt=" for all ")
    assert [job.prompt for job in jobs] == ["table", "list", "beside the video", "for all", "for all", "for all"]
    assert "1 prompt is for clips that are not in this run: ghost.npz" in caplog.text and "a.npz" not in caplog.text
    assert "names of videos" not in caplog.text
    assert [job.prompt for job in collect_jobs([table])][3:] == ["label"] * 3
    assert collect_jobs(videos[4:])[0].prompt == ""


def test_a_list_of_prompts_that_lies_beside_the_videos_is_not_overlooked(tmp_path, caplog):
    touch(tmp_path / "a.mp4", tmp_path / "prompts.mp4")
    (tmp_path / "prompts.txt").write_text("a.npz: a dog\n")
    with caplog.at_level(logging.WARNING):
        assert [job.prompt for job in collect_jobs([tmp_path])] == ["", ""]
    assert f"found but not used: {tmp_path / 'prompts.txt'}; to use it, give it with --prompts" in caplog.text
    caplog.clear()
    assert [job.prompt for job in collect_jobs([tmp_path], prompts=tmp_path / "prompts.txt")] == ["a dog", ""]
    assert not caplog.text


def test_a_sidecar_that_is_no_text_is_named(tmp_path):
    touch(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt, line 1: is not UTF-8"):
        collect_jobs([tmp_path / "a.mp4"])


def test_prompts_name_windows_or_their_whole_video(tmp_path):
    make_video(tmp_path / "a.mp4", 3.0)
    (tmp_path / "p.txt").write_text("a.npz: all of it\na_001.npz: the middle\n")
    jobs = collect_jobs([tmp_path / "a.mp4"], windows=True, duration_sec=1.0, prompts=tmp_path / "p.txt")
    assert [job.prompt for job in jobs] == ["all of it", "the middle", "all of it"]


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masks_for_all_or_from_a_folder(tmp_path, caplog):
    touch(*(tmp_path / "v" / f"{stem}.mp4" for stem in "abc"), tmp_path / "all.png",
          tmp_path / "m" / "a.npy", tmp_path / "m" / "b.mp4", tmp_path / "m" / "a.doc", tmp_path / "empty" / "x.png")
    assert {job.mask for job in collect_jobs([tmp_path / "v"], mask=tmp_path / "all.png")} == {tmp_path / "all.png"}
    with caplog.at_level(logging.WARNING):
        jobs = collect_jobs([tmp_path / "v"], mask=tmp_path / "m")
    assert [job.mask and job.mask.name for job in jobs] == ["a.npy", "b.mp4", None]
    assert "no mask for 1 of 3 clips" in caplog.text
    with pytest.raises(ValueError, match="no mask for any clip"):
        collect_jobs([tmp_path / "v"], mask=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such mask"):
        collect_jobs([tmp_path / "v"], mask=tmp_path / "none.png")


def test_a_clip_is_never_a_mask(tmp_path, caplog):
    """Videos and masks may lie in one folder."""
    touch(*(tmp_path / "v" / name for name in ("dog.mp4", "dog.png", "cat.mp4", "cat.mov", "owl.mp4", "emu.mp4")),
          tmp_path / "v" / "emu.npy", tmp_path / "v" / "emu.jpg")
    with caplog.at_level(logging.WARNING):
        jobs = collect_jobs([tmp_path / "v" / f"{stem}.mp4" for stem in ("dog", "cat", "owl", "emu")],
                            mask=tmp_path / "v")
    assert [job.mask and job.mask.name for job in jobs] == ["dog.png", "cat.mov", None, "emu.jpg"]
    assert "no mask for 1 of 4 clips" in caplog.text and "taken: emu.jpg, not emu.npy" in caplog.text
    with pytest.raises(ValueError, match="no mask for any clip"):
        collect_jobs([tmp_path / "v" / "owl.mp4"], mask=tmp_path / "v")
    with pytest.raises(ValueError, match=r"owl\.mp4: is one of the videos, and cannot be their mask"):
        collect_jobs([tmp_path / "v" / "owl.mp4"], mask=tmp_path / "v" / ".." / "v" / "owl.mp4")
    table = write_table(tmp_path / "v" / "t.tsv", "id\tpath\tmask", "a\towl.mp4\towl.mp4", "b\tdog.mp4\tdog.png")
    with pytest.raises(ValueError, match="the mask of a is the video itself"):
        collect_jobs([table])


def test_pictures_and_arrays_are_masks_before_videos(tmp_path, caplog):
    touch(tmp_path / "v" / "dog.mp4", tmp_path / "m" / "dog.avi", tmp_path / "m" / "dog.png")
    with caplog.at_level(logging.WARNING):
        assert [job.mask for job in collect_jobs([tmp_path / "v"], mask=tmp_path / "m")] == [tmp_path / "m" / "dog.png"]
    assert "taken: dog.png, not dog.avi" in caplog.text


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "overlap", "starts", "rest"),
    [
        (0, 24, 0, [0, 8, 16], 0),
        (0, 23.9996, 0, [0, 8, 15.999], 0),  # every window is full, down to the frame
        (0, 10.7, 5.3, [0, 2.7], 0),  # the last one fits, but for rounding
        (0, 27.9, 0, [0, 8, 16], 3.9),  # less than half a window
        (0, 28, 0, [0, 8, 16, 20], 0),  # moved back to end with the video
        (5, 24, 0, [5, 13], 3),
        (0, 20, 2, [0, 6, 12], 0),
        (0, 6, 0, [0], 0),
        (9, 6, 0, [9], 0),  # nothing there: one clip, which will say so
    ],
)
def test_window_starts(start, end, overlap, starts, rest):
    found, found_rest = window_starts(start, end, 8.0, overlap)
    assert found == starts and found_rest == pytest.approx(rest)


def test_windows_of_videos_and_of_rows(tmp_path, caplog):
    make_video(tmp_path / "long.mp4", 10.0)
    make_video(tmp_path / "short.mp4", 1.0)
    with caplog.at_level(logging.INFO):
        jobs = collect_jobs([tmp_path / "long.mp4", tmp_path / "short.mp4"], windows=True, duration_sec=3.0)
    assert [(job.id, job.start_sec, job.duration_sec) for job in jobs] == [
        ("long_000", 0.0, 3.0), ("long_001", 3.0, 3.0), ("long_002", 6.0, 3.0), ("short_000", 0.0, 3.0),
    ]
    assert "is left out: long 1.0 s" in caplog.text
    table = write_table(tmp_path / "t.tsv", "id\tpath\tstart\tduration", "a\tlong.mp4\t1\t6.5", "b\tlong.mp4\t8\t2",
                        "c\tgone.mp4\t\t")
    jobs = collect_jobs([table], windows=True, duration_sec=3.0, overlap_sec=1.0, name="w")
    assert [(job.id, job.path.name, job.start_sec, job.duration_sec) for job in jobs] == [
        ("w_001", "long.mp4", 1.0, 3.0), ("w_002", "long.mp4", 3.0, 3.0), ("w_003", "long.mp4", 4.5, 3.0),
        ("w_004", "long.mp4", 8.0, 2.0), ("w_005", "gone.mp4", 0.0, 3.0),
    ]


def test_listing_windows_decodes_nothing(tmp_path, monkeypatch):
    make_video(tmp_path / "a.mp4", 10.0)
    make_video(tmp_path / "live.mkv", 10.0, container_options={"live": "1"})  # no length in its header

    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("selva.media.container.decode_frames", refuse)
    with av.open(str(tmp_path / "live.mkv")) as container:
        assert container.duration is None
    jobs = collect_jobs([tmp_path / "a.mp4", tmp_path / "live.mkv"], windows=True, duration_sec=5.0)
    assert ids(jobs) == ["a_000", "a_001", "live_000", "live_001"]


def test_a_table_from_windows_finds_its_videos(tmp_path):
    touch(tmp_path / "raw" / "dog.mp4", tmp_path / "raw" / "a\\b.mp4")
    table = write_table(tmp_path / "t.tsv", "id\tpath", "1\traw\\dog.mp4", "2\traw/a\\b.mp4", "3\tC:\\raw\\dog.mp4")
    paths = [job.path for job in collect_jobs([table])]
    # A backslash in the name of a file that is there stays one; a drive is looked for as it is written.
    assert paths[:2] == [tmp_path / "raw" / "dog.mp4", tmp_path / "raw" / "a\\b.mp4"]
    assert str(paths[2]).endswith("C:\\raw\\dog.mp4") and not paths[2].exists()


def test_a_name_of_a_device_is_refused_on_windows(tmp_path, monkeypatch):
    touch(tmp_path / "aux.mp4")
    assert ids(collect_jobs([tmp_path / "aux.mp4"])) == ["aux"]
    monkeypatch.setattr("selva.inputs.file_names.ON_WINDOWS", True)
    with pytest.raises(ValueError, match=r"aux\.mp4: its clip would be called 'aux', Windows keeps this name"):
        collect_jobs([tmp_path / "aux.mp4"])
