"""Worker of the campaign of `fuzz.py`: reads files with the product's own readers, under a limit of memory.

Takes a line of JSON per file on stdin and answers with one on stdout. An error that a command would show as one line is
"refused"; everything else that is raised is a "traceback".
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

import extract_features
import infer
import partition_clips
import train_lora
from selva.checkpoint import load_adapter, load_checkpoint
from selva.data.cache import DataCache
from selva.data.folder import scan_folder
from selva.data.memmap.reader import MemmapDataset
from selva.extraction.manifest import read_manifest
from selva.features import load_features, load_settings
from selva.inputs.delimited import find_delimiter
from selva.inputs.prompts import read_prompts, read_sidecar
from selva.inputs.suffixes import VIDEO_SUFFIXES
from selva.inputs.table import read_clip_table
from selva.media import audio_blocks, audio_length, probe, read_audio, read_video, video_length
from selva.models.variants import get_variant
from selva.partition.segments import read_segments
from selva.partition.windows import read_captions, read_clips

MEMORY_BYTES = 8 << 30  # of addresses; a worker whose resident memory passes FAIR_BYTES is reported
SCRIPTS = (extract_features, infer, partition_clips, train_lora)


def read_settings(path: Path) -> None:
    for script in SCRIPTS:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                script.build_parser().parse_args(["--config", str(path)])
            except SystemExit as stop:
                if stop.code != 2:
                    raise AssertionError(f"exit code {stop.code}, expected 2") from stop
                if len(said.getvalue()) > 100_000:
                    raise AssertionError("the message is too long") from stop


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


MEDIA: list[Callable] = [probe, audio_length, read_audio, read_blocks]
READERS: dict[str, list[Callable]] = {
    "features.npz": [load_features, load_settings, read_folder], "packed.npz": [load_features, read_folder],
    "adapter.pt": [load_adapter], "adapter.safetensors": [load_adapter],
    "adapter_step00002.pt": [load_checkpoint, load_adapter], "memmap": [read_memmap], "cache": [read_cache],
    "clips.tsv": [lambda path: read_clip_table(path, VIDEO_SUFFIXES)],
    "clips.csv": [lambda path: read_clip_table(path, VIDEO_SUFFIXES)],
    "captions.tsv": [lambda path: read_captions(path, find_delimiter(path))], "windows.tsv": [read_clips],
    "segments.csv": [lambda path: read_segments([path], ["rain", "dog"])],
    "whisper.json": [lambda path: read_segments([path], ["whisper"])], "prompts.txt": [read_prompts, read_folder],
    "note.txt": [read_sidecar], "settings.yaml": [read_settings], "manifest.jsonl": [read_manifest],
}


def readers_of(name: str) -> list[Callable]:
    """Return the readers of one kind of file."""
    if name in READERS:
        return READERS[name]
    return [*MEDIA, video_length, lambda path: read_video(path, 0.64)] if name.startswith("video") else MEDIA


def outcome(name: str, path: Path) -> tuple[str, str]:
    """Return "ok", "refused" or "traceback", and the error."""
    said = []
    for read in readers_of(name):
        try:
            read(path)
        except (ValueError, OSError) as error:
            said.append(f"{type(error).__name__}: {error}")
        except Exception:  # whatever it is, it is what the campaign looks for
            return "traceback", traceback.format_exc()
    return ("refused", said[0]) if said else ("ok", "")


def memory_bytes() -> int:
    """Return the most resident memory that this process has had; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write to where the answers go
    print(json.dumps({"status": "ready", "memory": memory_bytes()}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        status, error = outcome(task["name"], Path(task["path"]))
        print(json.dumps({"status": status, "error": error, "memory": memory_bytes()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
