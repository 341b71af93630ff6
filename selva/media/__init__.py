"""Video and audio files <-> tensors: pictures at the two frame rates of the encoders, sound of a known rate.

    frames.py      read_video, sample_pictures: the pictures of a clip for the two image encoders
    masks.py       what read_video keeps of the pictures; mask_settings.py: MaskSettings
    audio.py       read_audio, prepare_audio, write_audio, extract_audio, audio_length, audio_seconds
    sound_pieces.py  who reads a sound, and how long it is; sound_stream.py, sound_header.py: what it needs for that
    copying.py     copy_audio: the sound of a video without decoding it
    pictures.py    decoded pictures: which way up, how long, time stamps that jump
    compressed.py  compress_sound: sound in few bytes, for pages
    mux.py         mux_video: a video with new sound
    make.py        write_video: pictures and sound that a program made
    container.py   probe, video_length: what a header says; and what the others need of FFmpeg

The only package that knows PyAV, soundfile and torchvision; each is imported where it is used.

Time 0 of a file is the start of its container, for the pictures and for the sound, so that both stay aligned: time
stamps may begin anywhere. (In transport streams it is the first picture; see container.time_origin.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selva.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from selva.media.audio import (
        audio_blocks,
        audio_length,
        audio_seconds,
        extract_audio,
        prepare_audio,
        read_audio,
        write_audio,
    )
    from selva.media.compressed import compress_sound
    from selva.media.container import probe, video_length
    from selva.media.copying import copied_audio_suffix, copy_audio
    from selva.media.frames import (
        SELVA_FILL_SEC,
        VideoFrames,
        read_video,
        resize_frame,
        sample_pictures,
        select_frames,
        shortened_duration,
    )
    from selva.media.make import write_video
    from selva.media.mask_settings import MASK_SUFFIXES, MaskSettings
    from selva.media.mux import mux_video

__all__ = [
    "MASK_SUFFIXES",
    "SELVA_FILL_SEC",
    "MaskSettings",
    "VideoFrames",
    "audio_blocks",
    "audio_length",
    "audio_seconds",
    "compress_sound",
    "copied_audio_suffix",
    "copy_audio",
    "extract_audio",
    "mux_video",
    "prepare_audio",
    "probe",
    "read_audio",
    "read_video",
    "resize_frame",
    "sample_pictures",
    "select_frames",
    "shortened_duration",
    "video_length",
    "write_audio",
    "write_video",
]

__getattr__, __dir__ = lazy_exports(__name__, {
    "MASK_SUFFIXES": "selva.media.mask_settings",
    "MaskSettings": "selva.media.mask_settings",
    "SELVA_FILL_SEC": "selva.media.frames",
    "VideoFrames": "selva.media.frames",
    "audio_blocks": "selva.media.audio",
    "audio_length": "selva.media.audio",
    "audio_seconds": "selva.media.audio",
    "compress_sound": "selva.media.compressed",
    "copied_audio_suffix": "selva.media.copying",
    "copy_audio": "selva.media.copying",
    "extract_audio": "selva.media.audio",
    "mux_video": "selva.media.mux",
    "prepare_audio": "selva.media.audio",
    "probe": "selva.media.container",
    "read_audio": "selva.media.audio",
    "read_video": "selva.media.frames",
    "resize_frame": "selva.media.frames",
    "sample_pictures": "selva.media.frames",
    "select_frames": "selva.media.frames",
    "shortened_duration": "selva.media.frames",
    "video_length": "selva.media.container",
    "write_audio": "selva.media.audio",
    "write_video": "selva.media.make",
})
