"""A sound on a page: a player of few bytes, and its spectrogram."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from selva.media import compress_sound, read_audio
from selva.utils.html_report import Media, ReportSound

LONGEST_SEC = 30.0  # of a sound on a page, which has to stay small


def page_sound(label: str, note: str, sound: Tensor, rate: int) -> ReportSound:
    """Return (samples,) as an MP3 with a label and one line about it; of a longer one the first 30 s, said there."""
    most = round(LONGEST_SEC * rate)
    if len(sound) > most:
        note = f"{note}; " * bool(note) + f"the first {LONGEST_SEC:.0f} of {len(sound) / rate:.0f} s"
        sound = sound[:most]
    return ReportSound(label, note, Media(compress_sound(sound, rate), "audio/mpeg"), sound.numpy(), rate)


def page_file(label: str, note: str, path: Path) -> ReportSound:
    """Return the sound of a file, of all its channels together, see :func:`page_sound`."""
    waveform, rate = read_audio(path)
    return page_sound(label, note, waveform.mean(dim=0), rate)
