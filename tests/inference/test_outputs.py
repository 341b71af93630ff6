"""selva.inference.outputs: names of files, and the conditions under which they are current."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_adapter import make_adapter

from selva.audio.loudness import normalize_loudness
from selva.flow import SamplingConfig
from selva.inference.config import InferenceConfig
from selva.inference.engine import SoundGenerator
from selva.inference.outputs import (
    SoundFiles,
    model_identity,
    name_problem,
    request_identity,
    shared_names,
    sound_files,
    sound_fingerprint,
)
from selva.inference.request import Sound, SoundRequest
from selva.media import MaskSettings


def a_sound() -> Sound:
    waveform = torch.linspace(-0.5, 0.5, 8000)
    return Sound(waveform, 16_000, normalize_loudness(waveform, 16_000)[1])


@pytest.mark.parametrize(
    "output, video, audio_only, number, expected",
    [
        ("out", True, False, None, ["out/a.b.flac", "out/a.b.mp4"]),
        ("out", True, True, None, ["out/a.b.flac"]),
        ("out", False, False, 2, ["out/a.b_2.flac"]),
        ("take.wav", True, False, None, ["take.wav"]),
        ("take.MP4", True, False, 3, ["take_3.MP4"]),
    ],
)
def test_names(output, video, audio_only, number, expected):
    files = sound_files(Path(output), "a.b", video, audio_only, number)
    assert list(files.written) == [Path(path) for path in expected]


def test_two_sounds_of_one_name_are_noticed():
    a, b = SoundFiles(Path("x.flac"), Path("x.mp4")), SoundFiles(Path("x.wav"), None)
    assert shared_names([a, b]) == [Path("x.yaml")] and not shared_names([a])


def test_names_that_differ_in_case_only_are_two_sounds_where_the_folder_has_both(monkeypatch):
    files = [SoundFiles(Path("out/dog.flac"), None), SoundFiles(Path("out/Dog.flac"), None)]
    for apart, expected in ((True, []), (False, [Path("out/Dog.flac"), Path("out/Dog.yaml")])):
        monkeypatch.setattr("selva.inference.outputs.tells_case_apart", lambda folder, apart=apart: apart)
        assert shared_names(files) == expected
    folders = [SoundFiles(Path("Loud/dog.flac"), None), SoundFiles(Path("loud/dog.flac"), None)]
    assert shared_names(folders) == [Path("loud/dog.flac"), Path("loud/dog.yaml")]


def test_a_name_that_the_system_cannot_have_is_told(monkeypatch):
    assert name_problem([SoundFiles(Path("dog.flac"), Path("dog.mp4"))]) is None
    long = Path(f"{'n' * 251}.flac")
    assert name_problem([SoundFiles(long, None)]) == f"{long}: the name has 256 bytes, expected at most 255"
    monkeypatch.setattr("selva.inputs.file_names.ON_WINDOWS", True)
    assert name_problem([SoundFiles(Path("con.flac"), None)]) == "con.flac: Windows keeps this name for a device"


def test_a_sound_is_current_when_all_of_it_is_there_and_means_the_same(tmp_path):
    files = SoundFiles(tmp_path / "a.flac", None)
    assert not files.are_current("1")
    files.save(a_sound(), dict(prompt="x"), "1")
    assert files.are_current("1") and not files.are_current("2")
    files.settings.write_text("prompt: x\n")  # by an older version, without a fingerprint
    assert not files.are_current("1")
    files.save(a_sound(), dict(prompt="x"), "1")
    files.audio.unlink()
    assert not files.are_current("1")


def test_what_others_made_is_noticed(tmp_path):
    files = SoundFiles(tmp_path / "a.flac", tmp_path / "a.mp4")
    assert files.foreign() == []
    files.audio.touch()  # a recording
    assert files.foreign() == [files.audio]
    assert not files.settings_are_foreign()
    files.settings.write_text("steps: 25\n")  # the user's own
    assert files.foreign() == [files.audio] and files.settings_are_foreign()
    files.audio.unlink()
    SoundFiles(files.audio, None).save(a_sound(), {"prompt": "x"}, "1")
    assert files.foreign() == [] and not files.settings_are_foreign()


def test_settings_come_before_and_are_completed_after_the_sound(tmp_path, monkeypatch):
    """A run that is stopped while it writes leaves nothing that looks finished."""
    files = SoundFiles(tmp_path / "a.flac", None)
    files.save(a_sound(), {}, "1")

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sound, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save(a_sound(), {}, "2")
    assert not files.are_current("1") and not files.are_current("2") and not files.foreign()


def test_everything_that_decides_a_sound_changes_its_fingerprint(tmp_path):
    for name, content in (("a.mp4", b"a"), ("b.mp4", b"b"), ("copy.mp4", b"a"), ("m.png", b"m")):
        (tmp_path / name).write_bytes(content)
    adapter, other = make_adapter(1), make_adapter(2)
    plain = {"video": tmp_path / "a.mp4", "prompt": "x"}

    def mark(seed: int = 1, request: dict | None = None, **engine) -> str:
        generator = SoundGenerator("tiny_16k", device="cpu", **{"precision": "bf16", **engine})
        identity = request_identity(SoundRequest(**{**plain, **(request or {})}))
        return sound_fingerprint(model_identity(generator), identity, seed)

    marks = [
        mark(), mark(2), mark(request={"video": tmp_path / "b.mp4"}), mark(request={"prompt": "y"}),
        mark(request={"negative_prompt": "y"}), mark(request={"start_sec": 1.0}), mark(request={"duration_sec": 2.0}),
        mark(request={"mask": MaskSettings(tmp_path / "m.png")}),
        mark(request={"mask": MaskSettings(tmp_path / "m.png", sync=False)}),
        mark(precision="fp32"), mark(sampling=SamplingConfig(24)), mark(sampling=SamplingConfig(solver="heun")),
        mark(long=True), mark(normalize="lufs"), mark(normalize="lufs", target=-20.0), mark(clip_features="use"),
        mark(adapters=[adapter]), mark(adapters=[(adapter, 0.5)]), mark(adapters=[other]),
    ]
    assert len(set(marks)) == len(marks)
    same = [mark(request={"video": tmp_path / "copy.mp4"}), mark(batch_size=1), mark(offload="auto"),
            mark(adapters=[(adapter, 0.0)])]
    assert set(same) == {marks[0]}


@pytest.mark.parametrize("name, is_file", [
    ("v0.5", False), ("take 2. final", False), ("dog.flac", True), ("d.MP4", True)])
def test_only_a_known_ending_makes_a_file_name(tmp_path, name, is_file):
    (tmp_path / "a.mp4").touch()
    assert InferenceConfig(inputs=[tmp_path / "a.mp4"], output=tmp_path / name).output_is_file is is_file
