"""Worker of the campaign of `fuzz.py`: makes the good files, and reads the damaged ones with the product's own readers.

    python scripts/fuzz_worker.py --make DIR      # writes the good files and prints their names

Else it takes a line of JSON per file on stdin and answers with one on stdout, under a limit of memory. An error that a
command would show as one line is "refused"; everything else that is raised is a "traceback".
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.checkpoint import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from selva.data.cache import DataCache
from selva.data.folder import scan_folder
from selva.data.memmap.reader import MemmapDataset, row_shapes
from selva.data.memmap.writer import MemmapWriter
from selva.extraction.config import ExtractionConfig
from selva.extraction.manifest import read_manifest
from selva.features import FeatureBundle, load_features, load_settings, save_features
from selva.inference.config import InferenceConfig
from selva.inputs.prompts import read_prompts, read_sidecar
from selva.inputs.suffixes import VIDEO_SUFFIXES
from selva.inputs.table import read_clip_table
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.media import audio_blocks, audio_length, probe, read_audio, read_video, video_length
from selva.models.variants import get_variant
from selva.partition.config import PartitionConfig
from selva.partition.segments import read_segments
from selva.partition.windows import read_captions, read_clips
from selva.training.config import RunConfig
from selva.utils.device import peak_memory_bytes
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text

MEMORY_BYTES = 8 << 30  # of addresses; a worker whose resident memory passes FAIR_BYTES is reported
CONFIGS = (ExtractionConfig, InferenceConfig, PartitionConfig, RunConfig)
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


def make_good_files(folder: Path) -> list[str]:
    """Write a good file, or a folder of them, of every kind that this FFmpeg can write; return the names of all."""
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
        save_adapter(folder / name, model, {"variant": "tiny_16k"})
    save_checkpoint(folder / "adapter_step00002.pt", model, {"variant": "tiny_16k"}, step=2, extra={"seed": 1},
                    optimizer=optimizer.state_dict(), scheduler={"last_epoch": 2})
    clips = [("a", "a dog"), ("b", "rain")]
    with MemmapWriter(folder / "memmap" / "set", TINY, clips, video=True, settings={}) as writer:
        for index in range(2):
            writer.write(index, {key: torch.rand(shape) for key, shape in row_shapes(TINY, True).items()}, "digest")
        writer.publish_if_complete()
    cache = DataCache(folder / "cache")
    cache.save("latents", {"a": 1}, {"mean": torch.randn(8, 4), "std": torch.rand(8, 4)})
    atomic_write_text(cache.folder / "files.json", json.dumps(  # pyright: ignore[reportOptionalOperand]  -- is enabled
        {"a.wav": {"stamp": {"size": 5, "mtime_ns": 10**18}, "notes": {"sha256": "0" * 64}}}, indent=0))
    return [name for name in (*MEDIA, *READERS) if (folder / name).exists()]


def _encode(path: Path, picture_codec: str | None, sound_codec: str) -> None:
    """Write a second of pictures and a tone; nothing where this FFmpeg has no such encoder."""
    import av
    from av.error import FFmpegError

    rate = 48_000 if sound_codec == "libopus" else 44_100
    try:
        with av.open(str(path), "w") as container:
            video = container.add_stream(picture_codec, rate=25) if picture_codec else None
            if isinstance(video, av.VideoStream):
                video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            audio = container.add_stream(sound_codec, rate=rate)
            for number in range(25):
                picture = np.full((48, 64, 3), number * 10, np.uint8)
                picture[10:20, number : number + 8] = 255
                if video is not None:
                    container.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
            fifo = av.AudioFifo()
            tone = np.sin(np.arange(rate, dtype=np.float32) * 0.06)[None]
            frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
            frame.rate = rate
            for part in av.AudioResampler(audio.format, audio.layout, rate).resample(frame):
                fifo.write(part)
            while (part := fifo.read(audio.codec_context.frame_size or 1024)) is not None:
                container.mux(audio.encode(part))
            for stream in container.streams:
                container.mux(stream.encode(None))
    except (FFmpegError, ValueError, LookupError):
        path.unlink(missing_ok=True)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_settings(path: Path) -> None:
    for config in CONFIGS:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                parser = cli.ArgumentParser("")
                parser.add_settings(config)
                parser.add_common()
                parser.parse_args(["--config", str(path)])
            except SystemExit as stop:
                assert stop.code == 2 and len(said.getvalue()) < 100_000, f"exit code {stop.code}, or a long message"


def read_memmap(folder: Path) -> None:
    rows = MemmapDataset(folder / "set", get_variant("tiny_16k"))
    for index in range(min(3, len(rows.ids))):
        rows.clip(index)


def read_cache(folder: Path) -> None:
    cache = DataCache(folder)
    cache.load("latents", {"a": 1})
    (folder / "a.wav").write_bytes(b"sound")
    os.utime(folder / "a.wav", ns=(10**18, 10**18))
    cache.content_hash(folder / "a.wav")
    cache.flush()


def read_blocks(path: Path) -> None:
    for _ in audio_blocks(path):
        pass


def read_folder(path: Path) -> None:
    path.with_suffix(".wav").touch()
    scan_folder(path.parent)


SOUND_READERS: list[Callable] = [probe, audio_length, read_audio, read_blocks]
READERS: dict[str, list[Callable]] = {
    "features.npz": [load_features, load_settings, read_folder], "packed.npz": [load_features, read_folder],
    "adapter.pt": [load_adapter], "adapter.safetensors": [load_adapter],
    "adapter_step00002.pt": [load_checkpoint, load_adapter], "memmap": [read_memmap], "cache": [read_cache],
    "clips.tsv": [lambda path: read_clip_table(path, VIDEO_SUFFIXES)],
    "clips.csv": [lambda path: read_clip_table(path, VIDEO_SUFFIXES)],
    "captions.tsv": [read_captions], "windows.tsv": [read_clips],
    "segments.csv": [lambda path: read_segments([path], {"rain": path, "dog": path})],
    "whisper.json": [lambda path: read_segments([path], {"whisper": path})], "prompts.txt": [read_prompts, read_folder],
    "note.txt": [read_sidecar], "settings.yaml": [read_settings], "manifest.jsonl": [read_manifest],
}


def readers_of(name: str) -> list[Callable]:
    """Return the readers of one kind of file."""
    more = [video_length, lambda path: read_video(path, 0.64)] if name.startswith("video.") else []
    return READERS.get(name) or SOUND_READERS + more


def outcome(name: str, path: Path) -> tuple[str, str]:
    """Return "ok", "refused" or "traceback", and the error."""
    said = []
    for read in readers_of(name):
        try:
            read(path)
        except (UserError, OSError) as error:  # another ValueError would end a script in a traceback
            said.append(f"{type(error).__name__}: {error}")
        except Exception:  # whatever it is, it is what the campaign looks for
            return "traceback", traceback.format_exc()
    return ("refused", said[0]) if said else ("ok", "")


def main() -> None:
    if sys.argv[1:2] == ["--make"]:
        print(json.dumps(make_good_files(Path(sys.argv[2]))))
        return
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write to where the answers go
    print(json.dumps({"status": "ready", "memory": peak_memory_bytes("cpu")}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        status, error = outcome(task["name"], Path(task["path"]))
        answer = {"status": status, "error": error, "memory": peak_memory_bytes("cpu")}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
