"""Sound without pictures as .npz files: extract_features.py --sound_only, and what reads them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from script_args import TINY

import extract_features
import infer
import train_lora
from scripts import convert_dataset, inspect_dataset
from selva.data.folder_dataset import load_clip_dataset
from selva.data.summary import summarise
from selva.extraction.manifest import read_manifest
from selva.features import load_features, save_features
from selva.models.variants import get_variant
from selva.training.config import ObjectiveConfig
from selva.training.objective import clip_losses
from selva.weights.load import load_generator

RATE = 22_050
RUN = ["--sound_only", "--prompt", "a stroke", "--workers", "0", *TINY]


def strokes(seconds: float, number: int) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.5 * np.exp(-6 * (t % 0.7)) * np.sin(2 * np.pi * (300 + 70 * number) * t)).astype(np.float32)


@pytest.fixture
def library(tmp_path):
    """Six single recordings, from too short to longer than a clip."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number, seconds in enumerate((0.3, 0.9, 2.0, 2.0, 3.4, 9.0)):
        soundfile.write(folder / f"stroke_{number}.wav", strokes(seconds, number), RATE)
    return folder


@pytest.fixture
def sounds(library, tmp_path):
    """Its features."""
    assert extract_features.main([str(library), "--output_dir", str(tmp_path / "sounds"), *RUN]) == 0
    return tmp_path / "sounds"


def test_recordings_become_clips_of_their_own_length_without_pictures(library, tmp_path, capsys):
    sounds = tmp_path / "sounds"
    assert extract_features.main([str(library), "--output_dir", str(sounds), *RUN]) == 0
    assert sorted(p.stem for p in sounds.glob("*.npz")) == [f"stroke_{n}" for n in range(1, 6)]
    lengths = [load_features(sounds / f"stroke_{n}.npz").duration for n in range(1, 6)]
    assert lengths == pytest.approx([0.9, 2.0, 2.0, 3.4, 8.0])
    rows = {row["id"]: row for row in read_manifest(sounds / "manifest.jsonl")}
    assert rows["stroke_0"]["status"] == "skipped" and "has 0.30 s of sound" in rows["stroke_0"]["reason"]
    assert "1.0 s of 9.0 s unused" in rows["stroke_5"]["reason"]
    found, rate = soundfile.read(sounds / "stroke_2.flac", dtype="float32")
    assert rate == RATE and np.abs(found - strokes(2.0, 2)).max() < 1e-4
    err = capsys.readouterr().err
    assert "only the beginning of 1 longer recording is used" in err


def test_the_features_are_what_the_model_takes_for_no_pictures(sounds):
    bundle, generator = load_features(sounds / "stroke_4.npz"), load_generator("tiny_16k")
    assert not bundle.has_video and bundle.clip_features.shape[1] == 27 and bundle.sync_features.shape[1] == 72
    assert torch.equal(bundle.clip_features, generator.empty_clip_feat.expand_as(bundle.clip_features))
    assert torch.equal(bundle.sync_features, generator.empty_sync_feat.expand_as(bundle.sync_features))


def test_a_second_run_does_only_what_has_changed(library, sounds, capsys):
    soundfile.write(library / "stroke_3.wav", strokes(2.5, 1), RATE)
    capsys.readouterr()
    assert extract_features.main([str(library), "--output_dir", str(sounds), *RUN]) == 0
    assert [line.split("/")[-1] for line in capsys.readouterr().out.split()] == ["stroke_3.npz"]


def test_windows_and_the_sound_of_videos(clip_dir, library, tmp_path):
    for name in ("knock_0.mp4", "knock_5.mp4"):
        shutil.copy(clip_dir / name, library)
    run = [str(library), "--windows", "--duration", "3", "--output_dir", str(tmp_path / "out"), *RUN]
    assert extract_features.main(run) == 0
    made = {path.stem: load_features(path) for path in (tmp_path / "out").glob("*.npz")}
    assert {"stroke_1_000", "stroke_5_000", "stroke_5_001", "stroke_5_002", "knock_0_000", "knock_5_000"} < set(made)
    assert made["stroke_5_002"].duration == 3 and made["knock_0_000"].duration == pytest.approx(2.0, abs=0.05)
    assert not any(bundle.has_video for bundle in made.values())


def test_masks_of_a_table_are_named_as_unused(library, tmp_path, capsys):
    table = library / "clips.csv"
    table.write_text("id,start,duration,prompt,mask\nstroke_5,1.5,2,a stroke,stroke_1.wav\n", encoding="utf-8")
    assert extract_features.main([str(table), "--output_dir", str(tmp_path / "out"), *RUN]) == 0
    assert "the masks of 1 clip are not used, as pictures do not count (--sound_only): stroke_5" in (
        capsys.readouterr().err)
    bundle = load_features(tmp_path / "out" / "stroke_5.npz")
    assert bundle.duration == 2 and "mask" not in bundle.settings
    found, _ = soundfile.read(tmp_path / "out" / "stroke_5.flac", dtype="float32")
    assert np.abs(found[: 2 * RATE] - strokes(9.0, 5)[round(1.5 * RATE) : round(3.5 * RATE)]).max() < 1e-4


def test_a_recording_goes_before_the_video_of_its_name(clip_dir, library, tmp_path, capsys):
    shutil.copy(clip_dir / "knock_0.mp4", library / "stroke_2.mp4")
    assert extract_features.main([str(library), "--output_dir", str(tmp_path / "out"), *RUN]) == 0
    assert f"several files of one name; taken: {library / 'stroke_2.wav'}, not stroke_2.mp4" in capsys.readouterr().err
    assert soundfile.info(tmp_path / "out" / "stroke_2.flac").samplerate == RATE
    assert len(list((tmp_path / "out").glob("*.npz"))) == 5


def test_they_are_trained_on_as_clips_whose_video_is_dropped(sounds):
    """Whatever vectors the file holds: the loss is that of the generator's own empty features."""
    variant, generator = get_variant("tiny_16k"), load_generator("tiny_16k")
    config = ObjectiveConfig(clip_features="use", seed=3)

    def losses():
        clips, problems = load_clip_dataset(sounds, variant, None, torch.device("cpu"), use_cache=False)
        assert not problems
        return clips, clip_losses(generator, clips, config, torch.float32)

    clips, expected = losses()
    one = clips.clip(0)
    assert not one.has_video and one.clip_f.isnan().all() and one.sync_f.isnan().all()
    for path in sounds.glob("*.npz"):  # as those of another generator would be
        bundle = load_features(path)
        changed = {name: getattr(bundle, name) * 0 + 1 for name in ("clip_features", "sync_features")}
        save_features(path, type(bundle)(**{**vars(bundle), **changed}))
    _, others = losses()
    assert torch.equal(expected, others) and expected.isfinite().all()
    for path in sounds.glob("*.npz"):
        bundle = load_features(path)
        save_features(path, type(bundle)(**{**vars(bundle), "settings": None}))  # now they count as pictures
    assert not torch.allclose(losses()[1], expected, rtol=1e-3)


def test_nothing_is_said_about_pictures_that_are_not_there(sounds, capsys):
    (sounds / "prompts.txt").write_text("stroke_2.npz: another stroke\n", encoding="utf-8")
    folder, _ = load_clip_dataset(sounds, get_variant("tiny_16k"), None, torch.device("cpu"), use_cache=False)
    summary = summarise(folder)
    assert "5 of them sound without pictures" in " ".join(summary.lines())
    assert not any("the same video" in line for line in summary.warnings())
    assert "extracted with another prompt" not in capsys.readouterr().err
    assert inspect_dataset.main([str(sounds)]) == 0
    out = capsys.readouterr().out
    assert "norm" not in out and "worth a look: 0" in out


def test_an_adapter_learns_from_them_beside_videos(feature_dir, sounds, tmp_path, capsys):
    run = ["--data_dir", str(feature_dir), str(sounds), "--output_dir", str(tmp_path / "run"), "--steps", "2",
           "--batch_size", "4", "--warmup_steps", "1", "--no_preview", "--preserve", "rain", "a bell rings", *TINY]
    assert train_lora.main(run) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_memmap_with_video_does_not_take_them(sounds, tmp_path, capsys):
    assert convert_dataset.main([str(sounds), str(tmp_path / "set"), "--variant", "tiny_16k"]) == 1
    assert "stroke_2.npz: is sound without pictures, which is no row of a memmap with video" in capsys.readouterr().err


def test_a_folder_of_recordings_alone_is_told_the_way(library, tmp_path, capsys):
    assert extract_features.main([str(library), "--output_dir", str(tmp_path / "out"), *TINY]) == 2
    assert "no videos in this folder" in (err := capsys.readouterr().err)
    assert "6 recordings there: extract_features.py --sound_only" in err


@pytest.mark.parametrize("options, message", [
    (["--mask", "{library}"], "--mask and --preview: with --sound_only pictures do not count"),
    (["--preview", "{library}"], "--mask and --preview: with --sound_only pictures do not count"),
    (["--audio_dir", "{library}"], "--audio_dir: with --sound_only the recordings themselves are the INPUT"),
    (["--audio", "none"], "--audio none: with --sound_only there would be nothing to train on"),
    (["--format", "memmap"], "--sound_only makes .npz files"),
    (["--output_dir", "{library}"], "is the folder of the recordings"),
    (["--output_dir", "{library}/deep/features", "--recursive"], "lies in the folder of the recordings, whose subf"),
])
def test_what_does_not_go_together_is_refused(library, tmp_path, capsys, options, message):
    options = [one.format(library=library) for one in options]
    assert extract_features.main([str(library), "--output_dir", str(tmp_path / "out"), *RUN, *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert sorted(p.suffix for p in library.iterdir()) == [".wav"] * 6


def test_a_sound_is_made_for_them_as_for_a_prompt_alone(sounds, tmp_path, capsys):
    """Whatever the file holds for no pictures; and another prompt is not warned of, as none was seen in pictures."""
    bundle = load_features(sounds / "stroke_2.npz")
    changed = {**vars(bundle), "sync_features": bundle.sync_features * 0 + 1}
    save_features(tmp_path / "x.npz", type(bundle)(**changed))
    made = []
    for source in (["--features", str(tmp_path / "x.npz")], ["--duration", "2"]):
        path = tmp_path / f"{len(made)}.wav"
        rest = ["--prompt", "rain", "--output", str(path), "--num_steps", "2", "--seed", "3", *TINY]
        assert infer.main([*source, *rest]) == 0
        made.append(soundfile.read(path)[0])
    assert np.abs(made[0] - made[1]).max() < 1e-4 < np.abs(made[0]).max()
    assert "keep it" not in capsys.readouterr().err
