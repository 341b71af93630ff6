"""The sound of a video as it is, in a file of its own, where that is the same sound."""

from __future__ import annotations

from pathlib import Path

from selva.media.audio import SILENCE_LEVEL, audio_length, read_audio, warn_of_cancellation
from selva.media.container import PathLike, audio_stream, open_media, read_packets
from selva.utils.errors import UserError
from selva.utils.files import atomic_path

# Codecs that can be taken out of a video as they are, and the file that libsndfile reads them from.
_COPY_SUFFIXES = {
    "mp3": ".mp3", "mp3float": ".mp3", "vorbis": ".ogg", "opus": ".ogg", "flac": ".flac",
    **dict.fromkeys(("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le"), ".wav"),
    **dict.fromkeys(("pcm_s16be", "pcm_s24be", "pcm_s32be"), ".aiff"),
}
AUDIO_COPY_SUFFIXES = tuple(sorted(set(_COPY_SUFFIXES.values())))
_COPY_CHECK_SEC = 10.0  # of a copy are compared with the original
_COPY_LENGTH_SEC = 0.1  # by which they may differ in length: padding at the end
_COPY_ERROR = 0.05  # relative; a shift of a few samples is far beyond, another decoder far below


def copied_audio_suffix(video_path: PathLike) -> str:
    """Return the suffix of the file, e.g. ".mp3", into which :func:`copy_audio` can put the sound of a video.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no sound in it, or of a kind that no such file can hold (AAC, for one).
    """
    with open_media(video_path) as container:
        codec = audio_stream(container, video_path).codec_context.name
    if codec not in _COPY_SUFFIXES:
        raise UserError(
            f"{video_path}: its sound is {codec}, which cannot be copied into {', '.join(AUDIO_COPY_SUFFIXES)}; "
            "extract it instead (decoded and written without loss)"
        )
    return _COPY_SUFFIXES[codec]


def copy_audio(video_path: PathLike, out_path: PathLike, start_sec: float = 0.0) -> float:
    """Write the whole sound of a video as it is, without decoding it; return its duration in seconds.

    Only for clips that begin at the start of the video: packets cannot be cut at an exact sample. Sound after the end
    of the clip is copied too. The copy must decode to the sound that :func:`read_audio` finds in the video, from the
    same first sample on; otherwise (sound that begins late, a codec whose delay is lost) there is an error.

    Args:
        out_path: its suffix is that of :func:`copied_audio_suffix`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the sound cannot be copied, and has to be extracted (:func:`extract_audio`).
        OSError: ``out_path`` cannot be written.
    """
    import av.error

    out_path, suffix = Path(out_path), copied_audio_suffix(video_path)
    if start_sec != 0:
        raise UserError(
            f"{video_path}: the clip begins at {start_sec:g} s, and copied sound cannot be cut exactly; extract it"
        )
    if out_path.suffix.lower() != suffix:
        raise UserError(f"{out_path}: the sound of {video_path} can only be copied into {suffix}")
    with atomic_path(out_path) as temporary:
        try:
            with open_media(video_path) as source, av.open(str(temporary.absolute()), "w") as target:
                stream = audio_stream(source, video_path)
                copy = target.add_stream_from_template(stream)
                for packet in read_packets(video_path, source, stream):
                    packet.stream = copy
                    target.mux(packet)
        except av.error.FFmpegError as error:
            raise OSError(f"{out_path}: cannot be written ({error.strerror})") from error
        _check_copy(video_path, temporary)
        num_samples, rate = audio_length(temporary)
    return num_samples / rate


def _check_copy(video_path: PathLike, copy_path: PathLike) -> None:
    """Raise if a copy does not begin with the sound of the video; decoders differ a little, so not bit by bit."""
    expected, rate = read_audio(video_path, 0.0, _COPY_CHECK_SEC)
    warn_of_cancellation(video_path, expected)
    try:
        found, found_rate = read_audio(copy_path, 0.0, _COPY_CHECK_SEC)
    except ValueError as error:
        reason = str(error).removeprefix(f"{copy_path}: ")
        raise UserError(f"{video_path}: a copy of its sound cannot be read ({reason}); extract it") from error
    num_samples = min(found.shape[1], expected.shape[1])
    same = found_rate == rate and found.shape[0] == expected.shape[0]
    same = same and abs(found.shape[1] - expected.shape[1]) <= _COPY_LENGTH_SEC * rate
    if same:
        error = (found[:, :num_samples] - expected[:, :num_samples]).norm()
        same = bool(error <= _COPY_ERROR * expected[:, :num_samples].norm() + SILENCE_LEVEL)
    if not same:
        raise UserError(f"{video_path}: a copy of its sound would not begin where the pictures do; extract it")
