"""A data folder becomes a training set: windows, sound, what is encoded when, and what cannot be used."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_data import TINY, noise, put_clip, put_sound

from selva.data import folder_dataset, texts
from selva.data.cache import CACHE_FOLDER
from selva.data.folder import FolderClip
from selva.data.folder_dataset import FolderDataset, first_clip_frame, load_clip_dataset, open_clip_dataset
from selva.data.latents import encode_latents, load_waveform
from selva.data.plan import plan_windows
from selva.data.split import origin_groups
from selva.features import FeatureBundle, load_features, save_features
from selva.models.variants import get_variant
from selva.models.zoo import build_mel
from selva.sequence import sequence_config
from selva.weights.load import load_vae

CPU = torch.device("cpu")


def load(folder, **options) -> tuple[FolderDataset, list]:
    clips, problems = load_clip_dataset(folder, TINY, None, CPU, **options)
    assert isinstance(clips, FolderDataset)
    return clips, problems


@pytest.fixture
def encoders(monkeypatch):
    """Count the texts and the sounds that are encoded, and the encoders that are loaded for it."""
    counts = {"vae": 0, "clip_text": 0, "sounds": 0, "texts": 0}

    def count(name, original):
        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)
        return counted

    def load_text(*args, **kwargs):
        encoder = load_clip_text(*args, **kwargs)
        encoder.encode = count("texts", encoder.encode)
        return encoder

    load_clip_text = texts.load_clip_text
    monkeypatch.setattr(texts, "load_clip_text", count("clip_text", load_text))
    monkeypatch.setattr(folder_dataset, "load_vae", count("vae", folder_dataset.load_vae))
    monkeypatch.setattr(folder_dataset, "encode_latents", count("sounds", encode_latents))

    def since_last():
        found = {name: n for name, n in counts.items() if n}
        counts.update(dict.fromkeys(counts, 0))
        return found

    return since_last


# -- windows -----------------------------------------------------------------------------------------------------------


def plan(tmp_path, seconds, max_duration=8.0, variant=TINY):
    put_clip(tmp_path, "a", seconds, sound=noise(1))
    (clip,) = folder_dataset.scan_folder(tmp_path).clips
    return plan_windows(clip, variant, max_duration)


@pytest.mark.parametrize("seconds", [0.64, 1.2, 7.966, 8.0])
def test_clips_up_to_the_limit_keep_their_length(tmp_path, seconds):
    """Pitfall B1: no rows are added to features."""
    assert plan(tmp_path, seconds) == (sequence_config("16k", seconds), (0,))


@pytest.mark.parametrize(
    "seconds, limit, starts",
    [
        (8.31, 8.0, (0,)),
        (8.33, 8.0, (0, 1)),
        (9.0, 8.0, (0, 1, 2, 3)),
        (12.0, 8.0, (0, 2, 3, 5, 7, 9, 10, 12)),
        (60.0, 8.0, (0, 23, 46, 69, 93, 116, 139, 162)),
        (6.0, 5.0, (0, 1, 2, 3)),
    ],
)
def test_windows_of_longer_clips_are_spread_over_them(tmp_path, seconds, limit, starts):
    sequence, found = plan(tmp_path, seconds, limit)
    assert found == starts and sequence == sequence_config("16k", limit)
    assert 0.32 * starts[-1] + limit <= seconds
    if len(starts) == 8:
        assert 0.32 * starts[-1] + limit > seconds - 0.32 - 1e-9  # up to the end


@pytest.mark.parametrize("variant", [TINY, get_variant("small_44k")], ids=lambda variant: variant.mode)
@pytest.mark.parametrize("limit", [0.64, 5.0, 7.3, 8.0])
def test_every_window_lies_inside_the_features(limit, variant):
    for seconds in np.linspace(limit, 17.0, 101):
        whole, config = sequence_config(variant.mode, seconds), variant.generator
        clip = FolderClip("a", Path("a.npz"), Path("a.wav"), "", "folder", "", "", seconds,
                          (whole.clip_seq_len, config.clip_dim), (whole.sync_seq_len, config.sync_dim), None, "")
        window, starts = plan_windows(clip, variant, limit)
        assert starts[0] == 0 and len(set(starts)) == len(starts) <= 8
        for start in starts:
            assert first_clip_frame(start) + window.clip_seq_len <= whole.clip_seq_len
            assert 8 * start + window.sync_seq_len <= whole.sync_seq_len
            assert 0.32 * start + limit <= seconds + 1e-9


def test_a_window_begins_with_the_clip_frame_on_show():
    for segment in range(200):
        begins = segment * 8 / 25
        assert first_clip_frame(segment) / 8 <= begins < (first_clip_frame(segment) + 1) / 8


def test_features_and_latents_of_a_window_are_of_the_same_stretch(tmp_path):
    sound = noise(12.2)
    put_clip(tmp_path, "a", 12.0, sound=sound)
    clips, _ = load(tmp_path)
    vae, mel = load_vae("tiny_16k"), build_mel("16k")
    normalised = torch.from_numpy(sound) / np.abs(sound).max() * 0.95  # over the whole file, not per window
    assert clips.num_windows(0) == 8
    for window in (0, 3, 7):
        clip, start = clips.clip(0, window), (0, 2, 3, 5, 7, 9, 10, 12)[window]
        assert clip.lengths == clips.lengths(0) == (250, 64, 192)
        assert clip.sync_f[:, 0].tolist() == list(range(8 * start, 8 * start + 192))
        assert clip.clip_f[0, 0] == int(8 * 0.32 * start) and clip.clip_f[-1, 0] == clip.clip_f[0, 0] + 63
        stretch = normalised[5120 * start : 5120 * start + 128_000]
        mean, std = encode_latents(stretch[None], mel, vae)
        torch.testing.assert_close(clip.mean, mean[0])
        torch.testing.assert_close(clip.std, std[0])


# -- sound -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, samples, frames", [("16k", 128_000, 250), ("44k", 353_280, 345)])
def test_eight_seconds_of_sound_make_exactly_the_latents_of_the_base(tmp_path, mode, samples, frames):
    """Pitfall A2: 353280 samples at 44.1 kHz, none of the 345 latents is made up."""
    put_sound(tmp_path / "a.wav", noise(9.0, 48_000), 48_000)
    sequence = sequence_config(mode)
    waveform = load_waveform(tmp_path / "a.wav", sequence, "peak")
    assert waveform.shape == (samples,) and sequence.latent_seq_len == frames
    assert waveform[-100:].abs().min() > 0
    assert build_mel(mode)(waveform[None]).shape[2] == 2 * frames


def test_the_level_is_that_of_the_base_unless_asked_otherwise(tmp_path):
    """Pitfall A4."""
    sound = noise(1.2)
    put_sound(tmp_path / "a.wav", sound)
    sequence = sequence_config("16k", 1.2)
    assert load_waveform(tmp_path / "a.wav", sequence, "peak").abs().max() == pytest.approx(0.95)
    assert torch.equal(load_waveform(tmp_path / "a.wav", sequence, "none")[: len(sound)], torch.from_numpy(sound))


def test_sound_that_is_too_short_is_followed_by_silence(tmp_path):
    """Pitfall A6."""
    sequence = sequence_config("16k", 2.0)
    put_sound(tmp_path / "a.wav", noise(0.7))
    waveform = load_waveform(tmp_path / "a.wav", sequence, "none")
    assert len(waveform) == sequence.num_audio_frames and not waveform[round(0.7 * 16_000) :].any()


def test_padded_clips_are_named_and_know_their_padding(tmp_path, caplog):
    """Pitfall A6: up to 0.25 s are as the sound of videos often is; more is named."""
    put_clip(tmp_path, "full", 2.0, seed=1)
    put_clip(tmp_path, "nearly", 2.0, sound=noise(1.8, seed=2))
    put_clip(tmp_path, "short", 2.0, sound=noise(1.0, 22_050, seed=3), rate=22_050)
    clips, problems = load(tmp_path)
    assert not problems and clips.ids == ["full", "nearly", "short"]
    assert "1 of 3 clips: the sound is shorter than the features" in caplog.text
    assert "short (1.00 of 2.00 s)" in caplog.text and "nearly" not in caplog.text
    assert clips.clip(0).padding is None and clips.clip(1).padding is None
    short = clips.clip(2)
    assert short.padding is not None and torch.equal(short.padding.mask, torch.arange(63) >= 30)  # of 31.25 frames
    vae, mel = load_vae("tiny_16k"), build_mel("16k")
    silence, _ = encode_latents(torch.zeros(1, 32_000), mel, vae)
    torch.testing.assert_close(short.padding.silence, silence[0, 31])
    # What was encoded is the padded sound, and its end is nearly that silence.
    mean, _ = encode_latents(load_waveform(tmp_path / "short.wav", short.sequence, "peak")[None], mel, vae)
    torch.testing.assert_close(short.mean, mean[0])
    assert (short.mean[45] - silence[0, 31]).norm() < 0.5 * (short.mean[15] - silence[0, 31]).norm()


def test_windows_behind_the_sound_are_left_out(tmp_path):
    put_clip(tmp_path, "a", 6.0, sound=noise(2.3, seed=1))
    clips, _ = load(tmp_path, max_duration_sec=2.0)
    whole, _ = load(put_long(tmp_path / "whole"), max_duration_sec=2.0)
    starts, all_starts = clips.clips[0].starts, whole.clips[0].starts
    assert starts == all_starts[: len(starts)] and 1 < len(starts) < len(all_starts)
    assert all(2.3 - start * 0.32 >= 0.64 for start in starts) and 2.3 - all_starts[len(starts)] * 0.32 < 0.64
    paddings = [clips.clip(0, window).padding for window in range(clips.num_windows(0))]
    assert paddings[0] is None and paddings[-1] is not None and not paddings[-1].mask.all()


def put_long(folder: Path) -> Path:
    put_clip(folder, "a", 6.0, seed=1)
    return folder


def test_a_cache_of_before_serves_padded_clips_and_is_kept(tmp_path, encoders):
    """Latents know nothing of their padding: it follows from the length of the sound."""
    put_clip(tmp_path, "a", 2.0, sound=noise(1.0, seed=3), text=True)
    expected = load(tmp_path)[0].clip(0)
    encoders()
    notes = tmp_path / CACHE_FOLDER / "files.json"
    records = json.loads(notes.read_text())
    assert records["a.wav"]["notes"].pop("seconds") == 1.0
    notes.write_text(json.dumps(records))  # as an earlier version has left it, which noted no lengths
    again = load(tmp_path)[0].clip(0)
    assert encoders() == {} and again.padding is not None and expected.padding is not None
    assert torch.equal(again.padding.mask, expected.padding.mask) and torch.equal(again.mean, expected.mean)


# -- what is encoded when ----------------------------------------------------------------------------------------------


def test_processes_share_the_encoding_of_a_folder(tmp_path, encoders):
    """Each encodes its clips into the one cache; what fails is left for the end, where it is reported once."""
    for seed, name in enumerate("abcde"):
        put_clip(tmp_path, name, 1.0, seed=seed, text=True)
    put_sound(tmp_path / "b.wav", np.zeros(20_000, np.float32))

    def opened() -> FolderDataset:
        clips, problems = open_clip_dataset(tmp_path, TINY, None)
        assert isinstance(clips, FolderDataset) and not problems
        return clips

    opened().encode_share(0, 2, CPU)
    assert encoders()["sounds"] == 3  # a, c, e
    opened().encode_share(1, 2, CPU)
    assert encoders()["sounds"] == 1  # d; b is silent
    clips = opened()
    ((path, reason),) = clips.prepare(CPU)
    assert path.name == "b.wav" and "silent" in reason and "sounds" not in encoders()
    assert clips.ids == ["a", "c", "d", "e"]
    alone, _ = load(tmp_path, use_cache=False)
    assert all(torch.equal(clips.clip(i).mean, alone.clip(i).mean) for i in range(4))
    unshared, _ = open_clip_dataset(tmp_path, TINY, None, use_cache=False)
    encoders()
    unshared.encode_share(0, 2, CPU)  # nobody else would find it
    assert encoders() == {}


def test_a_second_run_loads_no_encoder(tmp_path, encoders, monkeypatch):
    put_clip(tmp_path, "a", seed=1)
    put_clip(tmp_path, "b", 9.0, seed=2, prompt="a bell")
    put_clip(tmp_path, "c", 1.5, seed=3)
    first, problems = load(tmp_path)
    assert encoders() == {"vae": 1, "clip_text": 1, "sounds": 6, "texts": 2} and problems == []

    def forbidden(*args, **kwargs):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(folder_dataset, "load_vae", forbidden)
    monkeypatch.setattr(texts, "load_clip_text", forbidden)
    monkeypatch.setattr("selva.data.latents.read_audio", forbidden)
    second, problems = load(tmp_path)
    assert problems == [] and second.ids == first.ids == ["a", "b", "c"]
    for index, window in ((0, 0), (1, 3), (2, 0)):
        one, two = first.clip(index, window), second.clip(index, window)
        assert all(torch.equal(getattr(one, f), getattr(two, f)) for f in ("mean", "std", "clip_f", "sync_f", "text_f"))


def change_sound(folder, monkeypatch):
    put_sound(folder / "a.wav", noise(1.1, seed=7))
    os.utime(folder / "a.wav", ns=(2 * 10**18, 2 * 10**18))


def change_prompt(folder, monkeypatch):
    (folder / "prompts.txt").write_text("a: another\n")


def damage_cache(folder, monkeypatch):
    for path in (folder / CACHE_FOLDER).rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])


STALE = {
    "nothing": (lambda f, m: None, {}, {}),
    "sound": (change_sound, {}, {"vae": 1, "sounds": 1}),
    "copied elsewhere": (lambda f, m: os.utime(f / "a.wav"), {}, {}),
    "prompt": (change_prompt, {}, {"clip_text": 1, "texts": 1}),
    "level": (lambda f, m: None, {"normalize_audio": "none"}, {"vae": 1, "sounds": 2}),
    "length": (lambda f, m: None, {"max_duration_sec": 0.8}, {"vae": 1, "sounds": 2}),
    "weights": (lambda f, m: m.setattr(texts, "packaged_identity", lambda variant: "x"), {},
                {"vae": 1, "clip_text": 1, "sounds": 2, "texts": 1}),
    "front end (pitfall A1)": (lambda f, m: m.setattr(folder_dataset, "FRONT_END", "htk"), {}, {"vae": 1, "sounds": 2}),
    "damaged": (damage_cache, {}, {"vae": 1, "clip_text": 1, "sounds": 2, "texts": 1}),
    "switched off": (lambda f, m: None, {"use_cache": False}, {"vae": 1, "clip_text": 1, "sounds": 2, "texts": 1}),
}


@pytest.mark.parametrize("what", STALE)
def test_what_has_changed_is_encoded_again_and_nothing_else(tmp_path, encoders, monkeypatch, what):
    for seed, name in enumerate("ab"):
        put_clip(tmp_path, name, seed=seed)
    load(tmp_path)
    encoders()
    change, options, expected = STALE[what]
    change(tmp_path, monkeypatch)
    clips, problems = load(tmp_path, **options)
    assert encoders() == expected and problems == []
    assert torch.isfinite(clips.clip(0).mean).all() and clips.clip(0).text_f.shape == (77, 64)


def test_published_weights_are_known_by_their_content(tmp_path, monkeypatch):
    """Others of the same name and size make other latents; a copy of the same ones does not."""
    paths = {"vae": tmp_path / "v1-16.pth", "clip_text": tmp_path / "open_clip_model.safetensors"}
    monkeypatch.setattr(texts, "find_weights", lambda variant, folder, needs: {n: (paths[n],) for n in needs})

    def identity():
        return texts.weights_mark(get_variant("small_16k"), tmp_path, "vae")

    paths["vae"].write_bytes(b"12345")
    first = identity()
    os.utime(paths["vae"], ns=(5, 5))
    assert identity() == first
    paths["vae"].write_bytes(b"12346")
    os.utime(paths["vae"], ns=(5, 5))
    assert identity() != first
    paths["vae"].write_bytes(b"12345")
    assert identity() == first


def test_text_features_in_the_bundle_are_used_for_their_own_prompt_only(tmp_path, encoders):
    """Pitfall B6: another prompt is encoded, and said to differ from that of the sync features."""
    put_clip(tmp_path, "a", text=True)
    put_clip(tmp_path, "b", text=True, seed=1)
    (tmp_path / "prompts.txt").write_text("b: a bell\n")
    clips, _ = load(tmp_path)
    assert (clips.clip(0).text_f == 0.5).all() and not (clips.clip(1).text_f == 0.5).any()
    assert encoders()["texts"] == 1


def test_other_prompts_than_those_of_the_features_are_said_once(tmp_path, caplog):
    """Pitfall B6."""
    for seed, name in enumerate("abc"):
        put_clip(tmp_path, name, seed=seed)
    (tmp_path / "prompts.txt").write_text("b: a bell\nc: a horn\n")
    load(tmp_path)
    assert caplog.text.count("better extract again") == 1
    assert "2 of 3 clips" in caplog.text and "b: 'a bell', extracted with 'a knock'" in caplog.text


def test_a_folder_that_cannot_be_written_can_be_trained_on(tmp_path, caplog):
    put_clip(tmp_path, "a")
    (tmp_path / CACHE_FOLDER).write_text("a file where the folder should be")
    clips, problems = load(tmp_path)
    assert problems == [] and clips.clip(0).mean.shape == (32, 20)
    assert caplog.text.count("temporary folder") == 1


def test_nothing_is_written_with_the_cache_switched_off(tmp_path):
    put_clip(tmp_path, "a")
    before = sorted(tmp_path.rglob("*"))
    clips, _ = load(tmp_path, use_cache=False)
    assert clips.clip(0).mean.shape == (32, 20) and sorted(tmp_path.rglob("*")) == before


# -- memory ------------------------------------------------------------------------------------------------------------


def live_tensors():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def test_memory_does_not_grow_with_the_clips(tmp_path, monkeypatch):
    for seed in range(24):
        put_clip(tmp_path, f"clip{seed:02d}", 1.0, seed=seed, text=True)
    load(tmp_path)
    monkeypatch.setattr(folder_dataset, "RECENT_WINDOWS", 3)
    before = live_tensors()
    clips, _ = load(tmp_path)
    assert live_tensors() == before
    visited = []
    for index in range(24):
        visited.append(weakref.ref(clips.clip(index)))
    gc.collect()
    assert [ref() is not None for ref in visited] == [False] * 21 + [True] * 3
    assert clips.clip(23) is visited[23]()


def test_a_window_does_not_hold_on_to_its_long_clip(tmp_path):
    put_clip(tmp_path, "a", 12.0)
    clip = load(tmp_path)[0].clip(0)
    for tensor in (clip.clip_f, clip.sync_f):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


# -- what cannot be used -----------------------------------------------------------------------------------------------


def test_every_problem_is_returned_and_the_rest_is_usable(tmp_path):
    """Pitfalls A6, A8, I2: each named with its file; the ids of the others stay with their files."""
    for seed, name in enumerate("abcdefgh"):
        put_clip(tmp_path, name, 1.0, seed=seed)
    (tmp_path / "a.wav").unlink()
    (tmp_path / "b.npz").write_bytes(b"rubbish")
    put_sound(tmp_path / "c.wav", np.zeros(20_000, np.float32))
    put_sound(tmp_path / "d.wav", noise(0.5) * np.float32("inf"))
    (tmp_path / "e.wav").write_bytes(b"RIFF")
    put_sound(tmp_path / "f.wav", np.full(20_000, np.nan, np.float32))
    save_features(tmp_path / "g.npz", FeatureBundle(torch.zeros(1, 8, 1024), torch.zeros(1, 16, 64), 1.0))
    clips, problems = load(tmp_path)
    reasons = {path.name: reason for path, reason in problems}
    assert reasons.keys() == {"a.npz", "b.npz", "c.wav", "d.wav", "e.wav", "f.wav", "g.npz"} and len(problems) == 7
    for name, text in {"a.npz": "no sound", "b.npz": "cannot be read", "c.wav": "silent",
                       "f.wav": "not finite", "g.npz": "1024 wide, but tiny_16k takes 64"}.items():
        assert text in reasons[name]
    assert clips.ids == ["h"] and clips.clip(0).clip_f[0, 0] == 7


def test_features_shorter_than_they_claim_are_refused(tmp_path):
    put_clip(tmp_path, "a")
    put_clip(tmp_path, "b", seed=1)
    save_features(tmp_path / "a.npz", FeatureBundle(torch.zeros(1, 8, 64), torch.zeros(1, 16, 64), 8.0))
    clips, ((path, reason),) = load(tmp_path)
    assert clips.ids == ["b"] and path.name == "a.npz" and "expected at least (1, 64, 64) for 8 s" in reason


def test_a_clip_that_changes_during_training_is_said_to(tmp_path):
    put_clip(tmp_path, "a")
    clips, _ = load(tmp_path)
    for path in (tmp_path / CACHE_FOLDER / "latents").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"a\.npz: this file or the cache of its folder was changed"):
        clips.clip(0)


def test_a_folder_of_neither_kind(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds neither feature files .* nor a TensorDict memmap"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")


def test_a_folder_of_neither_kind_says_what_may_have_been_meant(tmp_path):
    for place, hint in (("videos/a.MP4", "it holds videos, of which extract_features.py makes features"),
                        ("sets/dogs/meta.json", "give one of the memmaps in it: .*dogs"),
                        ("all/day 1/a.npz", "give its subfolder: .*day 1"),
                        ("other/notes.txt", "extract_features.py writes both")):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.touch()
        with pytest.raises(ValueError, match=hint):
            load(tmp_path / place.split("/")[0])


# -- origins and content -----------------------------------------------------------------------------------------------


def put_source(folder, stem, source, **options):
    put_clip(folder, stem, **options)
    bundle = load_features(folder / f"{stem}.npz")
    save_features(folder / f"{stem}.npz", dataclasses.replace(bundle, source_sha256=source))


def test_clips_of_one_video_or_one_sound_share_an_origin(tmp_path):
    """Windows of a video; a copied sound; the same samples in another format."""
    for number, source in enumerate(["x", "x", "y", "", "", ""]):
        put_source(tmp_path, f"c{number}", source, seed=number, sound=np.round(noise(1.1, seed=number) * 2**15) / 2**15)
    shutil.copy(tmp_path / "c2.wav", tmp_path / "c3.wav")
    (tmp_path / "c4.wav").unlink()
    samples, rate = soundfile.read(tmp_path / "c2.wav", dtype="float32")
    soundfile.write(tmp_path / "c4.flac", samples, rate, subtype="PCM_16")
    for _ in range(2):  # encoded, then from the cache
        clips, problems = load(tmp_path)
        groups = origin_groups(clips)
        assert not problems and clips.ids == [f"c{i}" for i in range(6)]
        assert groups[0] == groups[1] and groups[2] == groups[3] == groups[4]
        assert len(set(groups)) == 3


def test_the_content_of_a_clip_is_that_of_all_its_parts(tmp_path):
    put_clip(tmp_path, "a", 2.0)
    recorded = (tmp_path / "a.wav").read_bytes()
    before = load(tmp_path)[0].content(0)
    assert before == load(tmp_path)[0].content(0) and all(before.values())

    def changed(**options):
        now = load(tmp_path, **options)[0].content(0)
        return {key for key in now if now[key] != before[key]}

    assert changed(max_duration_sec=1.0) == {"windows", "latents"}
    (tmp_path / "prompts.txt").write_text("a.npz: a bell\n")
    assert changed() == {"prompt"}
    (tmp_path / "prompts.txt").unlink()
    put_sound(tmp_path / "a.wav", noise(2.1, seed=1))
    os.utime(tmp_path / "a.wav")
    assert changed() == {"sound", "latents"}
    put_clip(tmp_path, "a", 2.0, seed=2)
    (tmp_path / "a.wav").write_bytes(recorded)  # a float WAV holds the time at which it was written
    assert changed() == {"features"}
