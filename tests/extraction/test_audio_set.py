from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from make_data import TINY, noise

from selva.data.latents import encode_latents
from selva.data.memmap.reader import MemmapDataset
from selva.extraction.audio_set import (
    AudioSetExtractor,
    SoundJob,
    SoundResult,
    ahead,
    plan_audio_set,
    read_windows,
    run_sounds,
)
from selva.extraction.extractor import FeatureExtractor
from selva.media import prepare_audio
from selva.models.zoo import build_mel
from selva.partition.windows import Window, partition, write_captions, write_clips
from selva.sequence import sequence_config
from selva.weights.load import load_vae

RATE = 22_050
LENGTHS = sequence_config("16k")


def put_recording(folder: Path, name: str, seconds: float = 18.0, seed: int = 0, suffix: str = ".wav") -> np.ndarray:
    """Write a stereo recording whose level slowly changes; return (samples, 2)."""
    folder.mkdir(exist_ok=True)
    sound = np.stack([noise(seconds, RATE, seed), noise(seconds, RATE, seed + 100)], axis=1)
    soundfile.write(folder / f"{name}{suffix}", sound, RATE, subtype="FLOAT" if suffix == ".wav" else None)
    return sound


def put_set(folder: Path, seconds: dict[str, float], captions: dict[str, str] | None = None):
    """Write recordings, clips.tsv and captions.tsv; return the arguments of ``plan_audio_set``."""
    windows = []
    for seed, (name, length) in enumerate(seconds.items()):
        put_recording(folder / "recordings", name, length, seed)
        windows += partition(name, round(length * RATE), RATE)
    write_clips(folder / "clips.tsv", windows)
    write_captions(folder / "captions.tsv", captions or {name: f"the sound of {name}" for name in seconds})
    return folder / "clips.tsv", folder / "captions.tsv", folder / "recordings"


def extractor(**kwargs) -> AudioSetExtractor:
    return AudioSetExtractor(FeatureExtractor(TINY, None, torch.device("cpu")), **kwargs)


def extract(folder: Path, jobs, share=None, **kwargs):
    """Extract a set; return the results and whether it is published."""
    makes = extractor(**kwargs)
    with makes.open_writer(folder, jobs) as writer:
        return list(makes.run(jobs, writer, share)), writer.publish_if_complete()


# -- the work list -----------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_table(tmp_path):
    tables = put_set(tmp_path, {"siren": 18, "bell": 9}, {"siren": "an ambulance", "bell": "ding", "siren_1": "dong"})
    jobs = plan_audio_set(*tables)
    assert not any(job.problem for job in jobs)
    assert [(job.window.id, job.path and job.path.name, job.caption) for job in jobs] == [
        ("siren_0", "siren.wav", "an ambulance"), ("siren_1", "siren.wav", "dong"), ("bell_0", "bell.wav", "ding"),
    ]


def test_flac_goes_before_wav_and_wav_before_the_others(tmp_path):
    tables = put_set(tmp_path, {"a": 9, "b": 9})
    put_recording(tmp_path / "recordings", "a", 9, suffix=".flac")
    put_recording(tmp_path / "recordings", "b", 9, suffix=".ogg")
    assert [job.path and job.path.name for job in plan_audio_set(*tables)] == ["a.flac", "b.wav"]


def test_what_is_missing_is_named_and_left_out(tmp_path, caplog):
    tables = put_set(tmp_path, {"a": 9, "b": 9, "c": 9}, {"a": "x", "b": "", "c": "z", "typo": "y"})
    (tmp_path / "recordings" / "a.wav").unlink()
    jobs = plan_audio_set(*tables)
    assert [job.window.id for job in jobs] == ["a_0", "b_0", "c_0"]
    assert "no recording called a (.flac" in jobs[0].problem and "no caption for b" in jobs[1].problem
    assert jobs[2].problem == "" and "no clip for typo" in caplog.text
    results, published = extract(tmp_path / "set", jobs)
    assert published and [(result.index, result.problem) for result in results] == [
        (0, jobs[0].problem), (1, jobs[1].problem), (2, ""),
    ]
    assert MemmapDataset(tmp_path / "set", TINY).ids == ["c_0"]


def test_nothing_to_do_is_an_error_that_says_why(tmp_path):
    tables = put_set(tmp_path, {"a": 9}, {"b": "x"})
    with pytest.raises(ValueError, match=r"captions.tsv: has no caption for a$"):
        plan_audio_set(*tables)
    write_clips(tables[0], [])
    with pytest.raises(ValueError, match=r"clips.tsv: there are no clips in it"):
        plan_audio_set(*tables)


def test_an_id_that_comes_twice_is_an_error(tmp_path):
    tables = put_set(tmp_path, {"a": 9})
    write_clips(tables[0], [Window("a_0", "a", 0, 9), Window("a_0", "a", 9, 18)])
    with pytest.raises(ValueError, match="a_0 come more than once"):
        plan_audio_set(*tables)


# -- sound -------------------------------------------------------------------------------------------------------------


def test_the_level_of_the_whole_recording_counts(tmp_path):
    """A quiet window of a loud recording stays quiet; the written-out rule of the specification."""
    sound = put_recording(tmp_path, "a", 18)
    windows = partition("a", len(sound), RATE)
    mono = torch.from_numpy(sound).mean(dim=1)
    normal = mono / mono.abs().max() * 0.95
    for window, found in zip(windows, read_windows(tmp_path / "a.wav", windows, LENGTHS), strict=True):
        expected = prepare_audio(normal[window.start_sample : window.end_sample], RATE, 16_000, normalize="none")
        assert isinstance(found, torch.Tensor)
        assert found.shape == (128_000,) and torch.equal(found, expected[:128_000])
    raw = read_windows(tmp_path / "a.wav", windows, LENGTHS, "none")
    assert isinstance(raw[0], torch.Tensor)
    torch.testing.assert_close(raw[0] / mono.abs().max() * 0.95, read_windows(tmp_path / "a.wav", windows, LENGTHS)[0])


def test_a_recording_is_read_once_for_all_its_windows(tmp_path, monkeypatch):
    import selva.extraction.audio_set as module

    tables = put_set(tmp_path, {"a": 25, "b": 9})
    read = []
    blocks = module.audio_blocks
    monkeypatch.setattr(module, "audio_blocks", lambda path: read.append(path.name) or blocks(path))
    results, _ = extract(tmp_path / "set", plan_audio_set(*tables), num_workers=0)
    assert len(results) == 4 and read == ["a.wav", "b.wav"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of this process from Linux")
def test_memory_holds_the_windows_and_not_the_recording(tmp_path):
    """15 minutes at 48 kHz are 173 MB as float32, five windows 8 MB."""
    sound = np.zeros(900 * 48_000, np.int16)
    sound[::1000] = 9_000
    soundfile.write(tmp_path / "a.wav", sound, 48_000)

    def megabytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    soundfile.write(tmp_path / "b.wav", sound[:480_000], 48_000)
    read_windows(tmp_path / "b.wav", partition("b", 480_000, 48_000), LENGTHS)  # imports, and makes the resampler
    before = megabytes()
    read_windows(tmp_path / "a.wav", partition("a", len(sound), 48_000), LENGTHS)
    assert megabytes() - before < 80


def test_bad_windows_are_named_and_the_others_are_used(tmp_path):
    sound = put_recording(tmp_path, "a", 26)
    sound[10 * RATE : 19 * RATE] = 0
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    ends = [(0, 8.1), (10, 18.1), (2, 9.9), (18, 26.1)]
    windows = [Window(f"a_{i}", "a", round(s * RATE), round(e * RATE)) for i, (s, e) in enumerate(ends)]
    good, silent, short, beyond = read_windows(tmp_path / "a.wav", windows, LENGTHS)
    assert isinstance(good, torch.Tensor)
    assert "a.wav, a_1 (10.00 to 18.10 s): the sound is silent" in silent
    assert "a_2 (2.00 to 9.90 s): is 7.90 s long, and a row takes 8 s" in short
    assert f"has {len(sound)} samples, but the clip ends at {windows[3].end_sample}" in beyond


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda sound: sound * 0, "the sound is silent"),
    (lambda sound: np.where(np.arange(len(sound))[:, None] == 5, np.nan, sound), "not finite"),
    (lambda sound: sound[:, :1] * [1.0, -0.95], "its channels cancel each other"),
])
def test_bad_recordings_are_refused(tmp_path, spoil, message):
    sound = put_recording(tmp_path, "a", 9)
    soundfile.write(tmp_path / "a.wav", spoil(sound), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"a\.wav: .*{message}"):
        read_windows(tmp_path / "a.wav", partition("a", len(sound), RATE), LENGTHS)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_the_rows_are_latents_and_text_features(tmp_path):
    jobs = plan_audio_set(*put_set(tmp_path, {"siren": 18, "bell": 9}))
    results, published = extract(tmp_path / "set", jobs)
    assert published and [(r.index, r.made, r.problem) for r in results] == [(i, True, "") for i in range(3)]

    clips = MemmapDataset(tmp_path / "set", TINY)
    assert clips.ids == ["siren_0", "siren_1", "bell_0"] and not clips.has_video
    assert clips.prompts == ["the sound of siren", "the sound of siren", "the sound of bell"]
    assert jobs[1].path is not None
    (sound,) = read_windows(jobs[1].path, [jobs[1].window], LENGTHS)
    vae = load_vae("tiny_16k", None, "cpu")
    assert isinstance(sound, torch.Tensor)
    mean, std = encode_latents(sound[None], build_mel("16k"), vae)
    text = FeatureExtractor(TINY, None, torch.device("cpu")).text_features("the sound of siren")
    row = clips.clip(1)
    assert torch.equal(row.mean, mean[0]) and torch.equal(row.std, std[0]) and torch.equal(row.text_f, text[0])


def test_a_second_run_makes_only_what_has_changed(tmp_path):
    tables = put_set(tmp_path, {"a": 18, "b": 9, "c": 9})
    extract(tmp_path / "set", plan_audio_set(*tables))
    results, published = extract(tmp_path / "set", plan_audio_set(*tables))
    assert published and not any(result.made for result in results)

    put_recording(tmp_path / "recordings", "b", 9, seed=7)
    write_captions(tables[1], {"a": "the sound of a", "b": "the sound of b", "c": "something else"})
    jobs = plan_audio_set(*tables)
    results, _ = extract(tmp_path / "set", jobs)
    assert [jobs[result.index].window.id for result in results if result.made] == ["b_0", "c_0"]
    assert MemmapDataset(tmp_path / "set", TINY).prompts[-1] == "something else"

    results, _ = extract(tmp_path / "set", jobs, normalize="none")
    assert all(result.made for result in results)


def test_what_cannot_be_made_is_named_and_left_out(tmp_path):
    tables = put_set(tmp_path, {"a": 9, "b": 18, "c": 9})
    (tmp_path / "recordings" / "a.wav").write_bytes(b"no sound")
    jobs = plan_audio_set(*tables)
    results, published = extract(tmp_path / "set", jobs)
    assert published and [bool(result.problem) for result in results] == [True, False, False, False]
    assert "a.wav" in results[0].problem
    assert MemmapDataset(tmp_path / "set", TINY).ids == ["b_0", "b_1", "c_0"]


def test_two_shares_make_the_same_set_as_one_run(tmp_path):
    tables = put_set(tmp_path, {"a": 18, "b": 9})
    jobs = plan_audio_set(*tables)
    extract(tmp_path / "one", jobs)
    for share, is_last in (([0, 2], False), ([1], True)):
        results, published = extract(tmp_path / "two", jobs, share)
        assert [result.index for result in results] == share and published is is_last
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert (tmp_path / "one.tsv").read_bytes() == (tmp_path / "two.tsv").read_bytes()


# -- reading ahead -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_order_and_not_too_far_ahead(num_workers):
    lock, started, taken, most = threading.Lock(), 0, 0, 0

    def work(item):
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - taken)
        return item * 10

    results = []
    for result in ahead(work, range(40), num_workers):
        results.append(result)
        with lock:
            taken += 1
    assert results == [item * 10 for item in range(40)]
    assert most <= 2 * num_workers + 2


def test_stopping_early_ends_the_threads():
    done = []
    for _ in ahead(done.append, range(1000), 2):
        break
    assert len(done) < 20


def test_a_caption_that_mmaudio_takes_for_missing_counts_as_none(tmp_path):
    tables = put_set(tmp_path, {"a": 9, "b": 9, "nan": 9}, {"a": "nan", "b": "a bell", "nan": "bread"})
    jobs = plan_audio_set(*tables)
    assert "has no caption for a but 'nan', which MMAudio takes for none" in jobs[0].problem
    results, published = extract(tmp_path / "set", jobs)
    assert published and [bool(result.problem) for result in results] == [True, False, False]
    assert (tmp_path / "set.tsv").read_text() == "id\tcaption\nb_0\ta bell\nnan_0\tbread\n"


class Rows:
    """What a manifest is told."""

    def __init__(self):
        self.reasons = {}

    def record(self, index, status, reason, files, seconds):
        self.reasons[index] = (status, reason)


def test_a_reason_that_clips_share_is_said_once_and_unused_sound_is_noted(caplog):
    jobs = [SoundJob(Window(f"a_{index}", "a", 0, 1), None, "x") for index in range(4)]
    results = [SoundResult(0, False, "no caption for a"), SoundResult(1, False, "no caption for a"),
               SoundResult(2, True, unused="7.5 s of 15.5 s unused"), SoundResult(3, True)]
    rows: Any = Rows()
    summary = run_sounds(results, 4, jobs, rows, "set")
    assert caplog.text.count("no caption for a") == 1 and summary.failed == 2
    assert [rows.reasons[index][1] for index in range(4)] == ["no caption for a"] * 2 + ["7.5 s of 15.5 s unused", ""]
    assert summary.unused == ["a_2 (7.5 s of 15.5 s unused)"]


@pytest.mark.parametrize(("seconds", "words"), [(8.1, ""), (15.5, "7.5 s of 15.5 s unused")])
def test_a_clip_that_goes_on_behind_its_row_says_how_long(seconds, words):
    sounds = AudioSetExtractor(FeatureExtractor(TINY, None, torch.device("cpu"), torch.float32))
    assert sounds._unused(Window("a_0", "a", 0, round(seconds * 48_000)), 48_000) == words
