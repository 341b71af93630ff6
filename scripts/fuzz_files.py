"""Files for the campaign of `fuzz.py`: good ones of every kind, and the ways in which they are damaged."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

from selva.checkpoint import save_adapter, save_checkpoint
from selva.data.cache import DataCache
from selva.data.memmap.reader import row_shapes
from selva.data.memmap.writer import MemmapWriter
from selva.features import FeatureBundle, save_features
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.models.variants import get_variant
from selva.utils.files import atomic_write_text

TINY = get_variant("tiny_16k")
VIDEOS = {  # suffix -> codecs of picture and sound
    ".mp4": ("libx264", "aac"), ".mov": ("mpeg4", "aac"), ".mkv": ("libx264", "flac"),
    ".webm": ("libvpx-vp9", "libopus"), ".avi": ("mpeg4", "libmp3lame"), ".ts": ("mpeg2video", "mp2"),
    ".flv": ("flv", "aac"),
}
SOUNDS = {".mp3": "libmp3lame", ".m4a": "aac", ".aac": "aac", ".opus": "libopus", ".mka": "flac", ".wma": "wmav2"}
PCM = {".wav": "PCM_16", ".flac": "PCM_24", ".ogg": "VORBIS", ".aiff": "PCM_16"}
TEXTS = {
    "clips.tsv": "id\tlabel\tpath\tstart\tduration\tprompt\na\tdog\ta.mp4\t1.5\t2\ta dog barks\nb\tcat\t\t\t\t\n",
    "clips.csv": 'id,caption,start\na,"a dog, far away",0\nb,rain,2.25\n',
    "captions.tsv": "id\tcaption\nrain\theavy rain\ndog\ta dog\n",
    "windows.tsv": "id\tname\tstart_sample\tend_sample\nrain_0\train\t0\t64800\nrain_1\train\t64800\t129600\n",
    "segments.csv": 'name,start,end,id,text\nrain,0,4,r,"heavy, rain"\nrain,4,8.5,,\n',
    "whisper.json": json.dumps({"segments": [{"start": 0, "end": 2.5, "text": " Hello."}, {"start": 3, "end": 4}]}),
    "prompts.txt": "# names\na.npz: a dog: barks\nb: rain\n#2 c: wind\n",
    "note.txt": "a dog barks\ntwice\n",
    "settings.yaml": "inputs: [a.mp4, b.mp4]\noutput_dir: out\nprompt: a dog\nduration: 4.5\nvariant: tiny_16k\n",
    "manifest.jsonl": '{"id": "a", "status": "done", "files": ["a.npz"]}\n{"id": "b", "status": "failed"}\n',
}
MEDIA = [f"video{suffix}" for suffix in VIDEOS] + [f"sound{suffix}" for suffix in (*SOUNDS, *PCM)]
SMALL = ["features.npz", "packed.npz", "adapter.pt", "adapter.safetensors", "adapter_step00002.pt", "memmap", "cache",
         *TEXTS]


def make_good_files(folder: Path) -> list[str]:
    """Write a good file, or a folder of them, for every kind that this FFmpeg can write; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MEDIA:
        path = folder / name
        if path.suffix in PCM:
            sound = np.sin(np.arange(16_000) * 0.05) * 0.4
            soundfile.write(path, sound, 16_000, subtype=PCM[path.suffix])
        else:
            picture, sound = VIDEOS.get(path.suffix, (None, SOUNDS.get(path.suffix, "")))
            _encode(path, picture, sound)
    for name, text in TEXTS.items():
        atomic_write_text(folder / name, text)
    torch.manual_seed(0)
    config = TINY.generator
    bundle = FeatureBundle(
        torch.randn(1, 8, config.clip_dim), torch.randn(1, 24, config.sync_dim), 1.0, "a dog", "tiny_16k",
        text_features=torch.randn(1, 77, config.text_dim), fps=25.0, source_sha256="0" * 64,
        settings={"start_sec": 0.0},
    )
    save_features(folder / "features.npz", bundle)
    with np.load(folder / "features.npz") as arrays:
        np.savez_compressed(folder / "packed.npz", **arrays)
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(12, 24), "out": torch.nn.Linear(12, 12)})
    inject_lora(model, LoRAConfig(rank=2, targets=("qkv",)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for name in ("adapter.pt", "adapter.safetensors"):
        save_adapter(folder / name, model, {"variant": "tiny_16k", "steps": 2})
    save_checkpoint(folder / "adapter_step00002.pt", model, {"variant": "tiny_16k", "steps": 2}, step=2,
                    optimizer=optimizer.state_dict(), scheduler={"last_epoch": 2}, extra={"seed": 1})
    (folder / "memmap").mkdir(exist_ok=True)
    clips = [("a", "a dog"), ("b", "rain")]
    with MemmapWriter(folder / "memmap" / "set", TINY, clips, video=True, settings={}) as writer:
        for index in range(2):
            rows = {key: torch.rand(shape) for key, shape in row_shapes(TINY, True).items()}
            writer.write(index, rows, "digest")
        writer.publish_if_complete()
    (folder / "cache").mkdir(exist_ok=True)
    cache = DataCache(folder / "cache")
    cache.save("latents", {"a": 1}, {"mean": torch.randn(8, 4), "std": torch.rand(8, 4)})
    cache.flush()
    atomic_write_text(cache.folder / "files.json", json.dumps(  # pyright: ignore[reportOptionalOperand]  -- is enabled
        {"a.wav": {"stamp": {"size": 5, "mtime_ns": 10**18}, "notes": {"sha256": "0" * 64}}}, indent=0))
    return [name for name in (*MEDIA, *SMALL) if (folder / name).exists()]


def _encode(path: Path, picture_codec: str | None, sound_codec: str) -> None:
    """Write a second of pictures and a tone; nothing where this FFmpeg has no such encoder."""
    import av

    rate = 48_000 if sound_codec == "libopus" else 44_100
    try:
        with av.open(str(path), "w") as container:
            video = container.add_stream(picture_codec, rate=25) if picture_codec else None
            if video is not None:
                video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            audio = container.add_stream(sound_codec, rate=rate)
            for number in range(25):
                if video is None:
                    break
                picture = np.full((48, 64, 3), number * 10, np.uint8)
                picture[10:20, number : number + 8] = 255
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
            fifo = av.AudioFifo()
            tone = np.sin(np.arange(rate, dtype=np.float32) * 0.06)[None] * 0.3
            resampler = av.AudioResampler(audio.format, audio.layout, rate)
            frame = av.AudioFrame.from_ndarray(tone.astype(np.float32), "fltp", "mono")
            frame.rate = rate
            for part in resampler.resample(frame):
                fifo.write(part)
            size = audio.codec_context.frame_size or 1024
            while (part := fifo.read(size)) is not None:
                container.mux(audio.encode(part))
            for stream in container.streams:
                container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError, LookupError):
        path.unlink(missing_ok=True)


# -- damage ------------------------------------------------------------------------------------------------------------

WORDS = [
    b"", b'"', b"'", b"\t", b"\n", b"\r", b"\0", b",", b":", b"[", b"]", b"{", b"}", b"-", b"~", b"*a", b"&a ",
    b"!!int ",
    b"!!python/object/apply:os.getcwd []", b"\xff", b"\xe2\x80\xa8", b"nan", b"-inf", b"1e999", b"9" * 400, b"null",
    b"true", b"2024-13-45", b"[" * 2000, b'{"a":' * 2000, b"../../x", b"/etc/passwd", b"\xef\xbb\xbf", b"<4", b"|O",
    b"(1,)", b"x" * 5000,
]
NUMBERS = [0, 1, -1, 127, 128, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]


class Payload:
    """An object whose pickle makes a file when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def damage(rng: random.Random, path: Path, others: list[Path], marker: Path) -> None:
    """Damage a file in place, in one to three ways."""
    if zipfile.is_zipfile(path) and rng.random() < 0.6:
        _damage_member(rng, path, marker)
        if rng.random() < 0.7:
            return
    content = bytearray(path.read_bytes())
    ways: list[Callable] = [_cut, _flip, _zero, _number, _repeat, _remove, _word, _noise]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.04:
            content = bytearray(rng.choice(others).read_bytes())  # another kind under this name
        elif rng.random() < 0.03:
            content = bytearray(pickle.dumps(Payload(marker)))
        else:
            rng.choice(ways)(rng, content)
    path.write_bytes(content)


def _place(rng: random.Random, content: bytearray) -> int:
    """Return a place in the file, often in its first bytes, where the headers are."""
    return rng.randrange(max(1, min(len(content), rng.choice((64, 512, len(content))))))


def _cut(rng, content):
    del content[rng.randrange(len(content) + 1):]


def _flip(rng, content):
    for _ in range(rng.choice((1, 3, 30))):
        if content:
            content[_place(rng, content)] ^= 1 << rng.randrange(8)


def _zero(rng, content):
    start, size = _place(rng, content), rng.choice((1, 16, 500))
    content[start : start + size] = bytes(len(content[start : start + size]))


def _number(rng, content):
    start, kind = _place(rng, content), rng.choice("<>") + rng.choice("IHQ")
    value = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(kind))
    content[start : start + struct.calcsize(kind)] = struct.pack(kind, value)


def _repeat(rng, content):
    start, size = _place(rng, content), rng.choice((3, 50, 5000))
    content[start:start] = content[start : start + size] * rng.choice((1, 5))


def _remove(rng, content):
    start = _place(rng, content)
    del content[start : start + rng.choice((1, 7, 400))]


def _word(rng, content):
    start = _place(rng, content)
    content[start : start + rng.choice((0, 0, 1, 4))] = rng.choice(WORDS)


def _noise(rng, content):
    start = _place(rng, content)
    content[start : start + rng.choice((4, 100))] = rng.randbytes(rng.choice((4, 100)))


def _damage_member(rng: random.Random, path: Path, marker: Path) -> None:
    """Damage a file inside an archive and pack it again, so that its checksum is right and its reader meets it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([n for n in members if n.endswith(".pkl")] or list(members))
    content = bytearray(members[name])
    if rng.random() < 0.2:
        plain = pickle.dumps(Payload(marker))
        if name.endswith(".npy"):
            buffer = io.BytesIO()
            np.save(buffer, np.array([Payload(marker)], dtype=object), allow_pickle=True)
            plain = buffer.getvalue()
        content = bytearray(plain)
    else:
        rng.choice([_cut, _flip, _zero, _number, _remove, _word, _noise])(rng, content)
    members[name] = bytes(content)
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w", kind) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member), data, kind)  # with one date, for the same bytes
