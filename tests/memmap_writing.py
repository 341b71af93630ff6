"""Writing a small memmap as an extraction does, for the tests of its writer."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch
from make_data import TINY

from selva.data.memmap.writer import MemmapWriter

SMALL = replace(TINY, generator=replace(TINY.generator, text_dim=4, clip_dim=4, sync_dim=4))
CLIPS = [(f"clip_{number}", f'says "{number}"') for number in range(6)]
SPAWN = multiprocessing.get_context("spawn")  # the one way to start a process that every system has
FORK = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


def open_writer(folder: Path, clips=CLIPS, video: bool = True, **settings) -> MemmapWriter:
    return MemmapWriter(folder, SMALL, clips, video=video, settings=settings)


def content(writer: MemmapWriter, clip_id: str, version: str = "") -> dict[str, torch.Tensor]:
    """Return rows that follow from the id and the version alone."""
    rng = torch.Generator().manual_seed(sum(map(ord, clip_id + version)))
    return {key: torch.rand(shape, generator=rng) for key, shape in writer.shapes.items()}


def digest(clip: tuple[str, str], version: str = "") -> str:
    return f"{clip[0]} {clip[1]} {version}"


def do(writer: MemmapWriter, clips=CLIPS, share=None, skipped=(), versions=None) -> list[str]:
    """Do what an extraction does with its share of the list; return the ids that had to be made."""
    made = []
    for index in range(len(clips)) if share is None else share:
        clip_id, version = clips[index][0], (versions or {}).get(clips[index][0], "")
        if writer.is_current(index, digest(clips[index], version)):
            continue
        if clip_id in skipped:
            writer.skip(index)
            continue
        writer.write(index, content(writer, clip_id, version), digest(clips[index], version))
        made.append(clip_id)
    return made


def extract(folder: Path, clips=CLIPS, video: bool = True, settings=None, **work) -> tuple[list[str], bool]:
    """Extract all of a list in one run; return the ids that had to be made, and whether the set is published."""
    with open_writer(folder, clips, video, **(settings or {})) as writer:
        return do(writer, clips, **work), writer.publish_if_complete()


def files(folder: Path) -> dict[str, bytes]:
    """Return all files of a set but its lock."""
    paths = (path for path in folder.parent.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in paths}


def published_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a set, without those of an unfinished change."""
    return {name: data for name, data in files(folder).items() if name.startswith("data") and "partial" not in name}
