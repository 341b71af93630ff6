"""scripts/caption.py: from recordings to clips with captions; what is done is not done again, what is edited stays."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from listening_models import put_clap, put_whisper
from make_data import noise
from make_media import make_video

import partition_clips
from scripts import caption as script
from selva import cli
from selva.inputs.jobs import collect_jobs
from selva.partition.captioning import labels, run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"whisper": put_whisper(folder / "whisper"), "clap": put_clap(folder / "clap")}


@pytest.fixture
def talks(tmp_path) -> Path:
    """A recording of 12 s and a video of 7 s."""
    folder = tmp_path / "talks"
    folder.mkdir()
    soundfile.write(folder / "long.flac", noise(12.0), 16_000)
    make_video(folder / "short.mp4", 7.0, size=(32, 32), fps=5, sound=noise(7.0, seed=3)[None])
    return folder


def caption(*arguments: object) -> int:
    return script.main([*map(str, arguments), "--device", "cpu"])


def segments(path: Path) -> list[tuple[float, float, str]]:
    return [(s["start"], s["end"], s["text"]) for s in json.loads(path.read_text())["segments"]]


def test_what_is_said_becomes_clips_with_captions(talks, models, tmp_path, capsys, caplog):
    template = 'a man says "{text}"'
    assert caption("--data_dir", talks, "--whisper", models["whisper"], "--to_captions", template) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written == [talks / "long.json", talks / "short.json"]
    content = json.loads(written[0].read_text())
    assert content["language"] == "en" and content["text"] == "Hello there. Yes. Good bye."
    # The short segment has joined the one before it.
    assert segments(written[0]) == [(0.0, 2.4, 'a man says "Hello there. Yes."'), (4.0, 6.0, 'a man says "Good bye."')]

    # A clip has its caption beside it, where extraction reads it; a long recording is to be cut.
    assert (talks / "short.txt").read_text() == 'a man says "Hello there. Yes. Good bye."\n'
    assert not (talks / "long.txt").exists() and "partition_clips.py --segments" in caplog.text
    assert [job.prompt for job in collect_jobs([talks])] == ['a man says "Hello there. Yes. Good bye."']
    cut = tmp_path / "cut"
    assert partition_clips.main(["--data_dir", str(talks), "--output_dir", str(cut), "--segments", str(written[0]),
                                 "--write_audio", str(cut / "audio")]) == 0
    with open(cut / "captions.tsv", newline="") as file:
        rows = {row["id"]: row["caption"] for row in csv.DictReader(file, delimiter="\t")}
    assert rows == {"long_0": 'a man says "Hello there. Yes."', "long_1": 'a man says "Good bye."'}
    assert (cut / "audio" / "long_1.txt").read_text() == 'a man says "Good bye."\n'


def test_what_is_done_is_not_done_again_and_what_is_edited_stays(talks, models, monkeypatch, caplog):
    def again(*more: str) -> int:
        return caption("--data_dir", talks, "--whisper", models["whisper"], *more)

    assert again() == 0
    assert segments(talks / "long.json")[1] == (4.0, 6.0, "Good bye.")
    assert not (talks / "short.txt").exists()
    heard = []
    real = run.Whisper
    monkeypatch.setattr(run, "Whisper", lambda *arguments: heard.append(arguments) or real(*arguments))
    assert again() == 0 and again("--to_captions", "<{text}>") == 0
    assert heard == []  # another template needs no listening
    assert segments(talks / "long.json")[1] == (4.0, 6.0, "<Good bye.>")
    assert (talks / "short.txt").read_text() == "<Hello there. Yes. Good bye.>\n"

    (talks / "long.json").write_text((talks / "long.json").read_text().replace("Good bye.", "Good buy."))
    (talks / "short.txt").write_text("a woman talks\n")
    soundfile.write(talks / "new.wav", noise(3.0, seed=9), 16_000)
    caplog.clear()
    assert again("--to_captions", "[{text}]") == 0
    assert len(heard) == 1  # the new one
    assert segments(talks / "long.json")[1] == (4.0, 6.0, "<Good buy.>")
    assert (talks / "short.txt").read_text() == "a woman talks\n"
    assert "edited; move them away to have them made anew: long.json" in caplog.text
    assert "have a caption of yours: short" in caplog.text
    assert (talks / "new.txt").read_text() == "[Hello there. Yes.]\n"  # "Good bye." would come after its end

    soundfile.write(talks / "new.wav", noise(7.0, seed=10), 16_000)  # another sound of that name
    assert again("--to_captions", "[{text}]") == 0
    assert len(heard) == 2 and (talks / "new.txt").read_text() == "[Hello there. Yes. Good bye.]\n"


def test_clap_gives_captions_and_leaves_doubtful_clips(talks, models, tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "labels.txt").write_text("a dog barks\nrain falls on a roof\na bell\n")
    soundfile.write(talks / "silent.wav", np.zeros(16_000), 16_000)

    def listen(*more: object) -> dict[str, dict[str, str]]:
        assert caption("--data_dir", talks, "--clap", models["clap"], "--labels", tmp_path / "labels.txt", *more) == 0
        with open(capsys.readouterr().out.strip(), newline="") as file:
            return {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}

    rows = listen("--min_score", "1")
    assert {row["outcome"] for row in rows.values()} == {"left to you"} and not list(talks.glob("*.txt"))
    assert "3 clips are left to you" in caplog.text and "silent.wav: it is silent" in caplog.text
    assert "less than --min_score 1" in rows["long.flac"]["remark"]
    monkeypatch.setattr(labels.Clap, "sound", lambda *_: pytest.fail("listened again"))
    rows = listen("--min_score", "-1", "--min_margin", "0")
    assert rows["silent.wav"]["outcome"] == "left to you"
    for name in ("long.flac", "short.mp4"):
        assert rows[name]["outcome"] == "written" and float(rows[name]["score"]) >= float(rows[name]["second_score"])
        assert (talks / name).with_suffix(".txt").read_text() == f"{rows[name]['caption']}\n"
    assert "longer than 10 s, of which CLAP heard the beginning: long" in caplog.text

    (talks / "short.txt").write_text("my own words\n")
    rows = listen("--min_score", "-1", "--min_margin", "0")
    assert (rows["short.mp4"]["outcome"], rows["long.flac"]["outcome"]) == ("kept", "as before")
    assert (talks / "short.txt").read_text() == "my own words\n"
    rows = listen("--min_score", "1")
    assert "(it has the caption 'my own words')" in caplog.text

    (talks / "clap_scores.tsv").write_text("my table\n")
    given = ("--data_dir", talks, "--clap", models["clap"], "--labels", tmp_path / "labels.txt")
    assert caption(*given) == cli.EXIT_FAILED
    assert (talks / "clap_scores.tsv").read_text() == "my table\n" and "choose another --output_dir" in caplog.text


def test_captions_of_features_go_into_their_prompts_txt(talks, models, tmp_path):
    (tmp_path / "labels.txt").write_text("a bell\n")
    prompts = talks / "prompts.txt"
    assert caption("--data_dir", talks, "--clap", models["clap"], "--labels", tmp_path / "labels.txt",
                   "--min_score", "-1", "--prompts", prompts, "--output_dir", tmp_path / "out") == 0
    assert prompts.read_text() == "long.npz: a bell\nshort.npz: a bell\n"
    assert not list(talks.glob("*.tsv")) and (tmp_path / "out" / "clap_scores.tsv").is_file()


def test_one_bad_sound_ends_nothing(talks, models, caplog):
    (talks / "bad.wav").write_bytes(b"RIFF, or not")
    soundfile.write(talks / "nan.wav", np.full(8000, np.nan, np.float32), 16_000, subtype="FLOAT")
    assert caption("--data_dir", talks, "--whisper", models["whisper"]) == cli.EXIT_FAILED
    assert caplog.text.count("left out: ") == 2 and "nan.wav" in caplog.text and "bad.wav" in caplog.text
    assert (talks / "long.json").is_file() and not (talks / "bad.json").exists()


@pytest.mark.skipif("WHISPER_DIR" not in os.environ or not shutil.which("espeak-ng"),
                    reason="needs espeak-ng, and a real Whisper in the folder WHISPER_DIR")
def test_a_real_whisper_understands_a_spoken_sentence(tmp_path):
    talks = tmp_path / "talks"
    talks.mkdir()
    sentence = "Please close the window before it begins to rain."
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(talks / "said.wav"), sentence], check=True)
    speech, rate = soundfile.read(talks / "said.wav")
    pause = np.zeros(5 * rate)
    soundfile.write(talks / "twice.wav", np.concatenate([speech, pause, speech]), rate)
    assert caption("--data_dir", talks, "--whisper", os.environ["WHISPER_DIR"], "--to_captions", "<{text}>") == 0
    assert (talks / "said.txt").read_text() == f"<{sentence}>\n"
    found = segments(talks / "twice.json")
    assert [text for *_, text in found] == [f"<{sentence}>"] * 2
    for begin, (start, end, _) in zip((0.0, len(speech) / rate + 5), found, strict=True):
        middle = begin + len(speech) / rate / 2
        assert start < middle < end


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--whisper {whisper} --clap {clap} --labels {labels}", 2, "give one of --whisper and --clap"),
        ("--clap {clap}", 2, "give both"),
        ("--whisper {whisper} --labels {labels}", 2, "--labels: belongs to --clap"),
        ("--clap {clap} --labels {labels} --to_captions x{{text}}", 2, "--to_captions: belongs to --whisper"),
        ("--whisper {whisper} --to_captions hello", 2, "has no {text}"),
        ("--whisper {whisper} --merge_below_sec -1", 2, "expected 0 or more"),
        ("--whisper {whisper} --prompts p", 2, "only with --to_captions"),
        ("--whisper {whisper} --data_dir {talks}/no", 2, "no such folder"),
        ("--whisper {talks}/no", 1, "hf download openai/whisper-small --local-dir whisper-small"),
        ("--whisper openai/whisper-none", 1, "hf download openai/whisper-none"),
        ("--whisper {clap}", 1, "holds a model of the kind clap, expected whisper"),
        ("--clap {whisper} --labels {labels}", 1, "holds a model of the kind whisper, expected clap"),
        ("--whisper {whisper} --language xx", 1, "knows de, en"),
        ("--clap {clap} --labels {talks}/no.txt", 1, "no such file"),
        ("--clap {clap} --labels {empty}", 1, "no captions in it"),
        ("--whisper {whisper} --data_dir {whisper}", 1, "no sounds and no videos in it"),
    ],
)
def test_mistakes_end_in_one_line(talks, models, tmp_path, arguments, code, message, caplog, capsys):
    (tmp_path / "labels.txt").write_text("a bell\n")
    (tmp_path / "empty.txt").write_text("# none\n")
    places = {**models, "talks": talks, "labels": tmp_path / "labels.txt", "empty": tmp_path / "empty.txt"}
    given = arguments.format(**places).split()
    before = sorted(talks.iterdir())
    assert caption(*([] if "--data_dir" in given else ["--data_dir", talks]), *given) == code
    (said,) = caplog.messages or capsys.readouterr().err.splitlines()[:1]
    assert message in said and "\n" not in said
    assert sorted(talks.iterdir()) == before
