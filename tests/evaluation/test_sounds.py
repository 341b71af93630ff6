"""selva.evaluation.sounds: pairs by name, and figures that need no network."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from struck_sounds import RATE, strikes

from selva.evaluation import sounds
from selva.utils.errors import UserError


def test_pairs_are_those_of_one_name_and_the_others_are_named(folders, caplog):
    generated, reference = folders
    soundfile.write(generated / "alone.wav", strikes([1.0], 300), RATE)
    soundfile.write(generated / "b.wav", strikes([1.0], 300), RATE)  # goes before b.flac, as everywhere
    found = sounds.find_pairs(generated, reference, None, None)
    assert [(pair.name, pair.generated.name, pair.reference.name) for pair in found] == [
        ("a", "a.flac", "a.wav"), ("b", "b.wav", "b.wav"), ("c", "c.flac", "c.wav")]
    assert "alone" in caplog.text and "1 of 4" in caplog.text


def test_captions_come_from_any_table_of_clips(folders, tmp_path, caplog):
    (tmp_path / "captions.csv").write_text("name;caption\na;a bell\nc;another\n")
    found = sounds.find_pairs(*folders, None, tmp_path / "captions.csv")
    assert [pair.caption for pair in found] == ["a bell", None, "another"]
    assert "no caption for 1 of 3 sounds: b" in caplog.text
    (tmp_path / "wrong.tsv").write_text("clip\ttext\na\tb\n")
    with pytest.raises(UserError, match="clip, text"):
        sounds.read_captions(tmp_path / "wrong.tsv")


def test_names_are_compared_in_one_form(folders, tmp_path):
    generated, reference = folders
    for name, folder in (("e\u0301cho.wav", generated), ("\u00e9cho.wav", reference)):
        soundfile.write(folder / name, strikes([1.0], 300), RATE)
    (tmp_path / "captions.tsv").write_text("id\tcaption\ne\u0301cho\ta hall\n", encoding="utf-8")
    found = {pair.name: pair for pair in sounds.find_pairs(generated, reference, None, tmp_path / "captions.tsv")}
    assert found["\u00e9cho"].caption == "a hall"


def test_several_files_of_one_name_are_said(folders, caplog):
    generated, reference = folders
    soundfile.write(generated / "a.wav", strikes([1.0], 300), RATE)
    (generated / "b.mp4").touch()  # the video of b.flac, which is no choice
    (generated / "c.xyz").touch()
    sounds.find_pairs(generated, reference, None, None)
    assert f"{generated}: several files of one name; taken: a.wav, not a.flac\n" in caplog.text
    assert "of no known kind: c.xyz;" in caplog.text


def test_captions_are_not_cut_and_not_guessed(tmp_path, caplog):
    (tmp_path / "c.csv").write_text("id,caption\na,a bell, far away\n")
    with pytest.raises(UserError, match="line 2: more cells than columns"):
        sounds.read_captions(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text("id,caption\na,a bell\na,a dog\nb,x\nb,x\n")
    assert sounds.read_captions(tmp_path / "c.csv") == {"a": "a dog", "b": "x"}
    assert "several captions, of which the last counts: a\n" in caplog.text


def test_channels_that_cancel_each_other_are_refused(tmp_path):
    left = strikes([1.0], 300)
    soundfile.write(tmp_path / "a.wav", np.stack([left, -left], axis=1), RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"a\.wav: its channels cancel each other"):
        sounds.read_mono(tmp_path / "a.wav")


def test_figures_of_equal_shifted_and_quieter_sounds():
    sound = torch.from_numpy(strikes([1.0, 2.5, 4.0], 600))
    equal = sounds.pair_figures(sound, sound, RATE)
    assert equal["stft_distance"] == equal["log_spectral_distance_db"] == equal["loudness_difference_lu"] == 0
    assert equal["onset_f1"] == 1 and equal["centroid_difference_oct"] == equal["silent_share_difference"] == 0
    quieter = sounds.pair_figures(sound / 2, sound, RATE)
    assert quieter["loudness_difference_lu"] == pytest.approx(-6.02, abs=0.01)
    assert quieter["stft_distance"] == pytest.approx(0.5 + np.log(2), rel=0.01)  # half of every magnitude is missing
    late = sounds.pair_figures(torch.from_numpy(strikes([1.2, 2.7, 4.2], 600)), sound, RATE)
    assert late["onset_f1"] == 0 and late["centroid_difference_oct"] == pytest.approx(0, abs=0.02)
    octave = sounds.pair_figures(torch.from_numpy(strikes([1.0, 2.5, 4.0], 1200)), sound, RATE)
    assert octave["centroid_difference_oct"] == pytest.approx(1, abs=0.1)


def test_silence_and_unequal_lengths():
    sound = torch.from_numpy(strikes([1.0, 2.5], 600))
    silent = sounds.pair_figures(torch.zeros(len(sound)), sound, RATE)
    assert silent["rms_db"] is None and silent["stft_distance"] is None and silent["log_spectral_distance_db"] is None
    assert silent["loudness_difference_lu"] is None and silent["onset_f1"] == 0
    shorter = sounds.pair_figures(sound[: 3 * RATE], sound, RATE)
    assert shorter["length_difference_sec"] == pytest.approx(-2) and shorter["stft_distance"] == 0
    assert sounds.stft_distance(sound[:100], sound[:100]) is None


def test_other_rates_keep_level_and_silence():
    sound = torch.from_numpy(strikes([1.0], 600))
    louder = sounds.at_rate(sound, RATE, 48000)
    assert len(louder) == 3 * len(sound)
    assert float(louder.abs().max()) == pytest.approx(float(sound.abs().max()), rel=0.05)
    assert sounds.at_rate(torch.zeros(1600), RATE, 8000).shape == (800,)
    assert sounds.at_rate(sound, RATE, RATE) is sound


def test_bad_folders_end_in_one_clear_line(tmp_path, folders):
    generated, reference = folders
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no sounds and no videos"):
        sounds.find_pairs(tmp_path / "empty", reference, None, None)
    with pytest.raises(FileNotFoundError):
        sounds.find_pairs(tmp_path / "missing", reference, None, None)
    (tmp_path / "other").mkdir()
    soundfile.write(tmp_path / "other" / "z.wav", strikes([1.0], 300), RATE)
    with pytest.raises(UserError, match="files are paired by their names"):
        sounds.find_pairs(generated, tmp_path / "other", None, None)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], np.float32), RATE, subtype="FLOAT")
    with pytest.raises(UserError, match="not finite"):
        sounds.read_mono(tmp_path / "nan.wav")
