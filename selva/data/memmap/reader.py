"""Training data of MMAudio: a TensorDict memmap and its table of ids, read row by row.

    data/vgg-train/meta.json          name, shape and type of every tensor
    data/vgg-train/mean.memmap ...    raw float32 values: mean, std, text_features, clip_features, sync_features
    data/vgg-train.tsv                id and label (or caption) of every row

Sets of sound without pictures lack the last two tensors. The files are read here by the shapes in ``meta.json`` instead
of through tensordict, whose format can also hold pickled objects: nothing in a data folder is ever executed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, Lengths, TrainingClip
from selva.data.memmap.rows import RowFile
from selva.inputs.delimited import read_text_table, refuse_long_rows
from selva.models.variants import Variant
from selva.sequence import sequence_config
from selva.utils.errors import UserError
from selva.utils.files import real_path
from selva.utils.text import counted

log = logging.getLogger(__name__)

META_FILE, RECORD_SUFFIX = "meta.json", "rows.json"
TEXT_COLUMNS = ("label", "caption")  # of video sets, of audio sets
SOUND_KEYS = ("mean", "std", "text_features")
VIDEO_KEYS = ("clip_features", "sync_features")
SAMPLED_TOKENS = 4  # in the middle of a row, which tell it from others without reading all of it


def is_memmap(folder: Path) -> bool:
    """Return True where a data folder is a TensorDict memmap rather than a folder of ``.npz`` files.

    Raises:
        FileNotFoundError: there is no such folder yet, because its extraction has not come to the end.
    """
    if not folder.exists() and partial_path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: is not complete yet, its rows are in {partial_path(folder)}; run the "
                                "extraction again, all of its parts")
    return (folder / META_FILE).is_file() and not any(folder.glob("*.npz"))


def row_shapes(variant: Variant, video: bool) -> dict[str, tuple[int, int]]:
    """Return the shape of one row of every tensor, in the order of ``meta.json``: 8 s of a variant.

    Args:
        video: False for a set of sound without pictures, which lacks the features of the frames.
    """
    config, sequence = variant.generator, sequence_config(variant.mode)
    shapes = {
        "mean": (sequence.latent_seq_len, config.latent_dim),
        "std": (sequence.latent_seq_len, config.latent_dim),
        "text_features": (config.text_seq_len, config.text_dim),
        "clip_features": (sequence.clip_seq_len, config.clip_dim),
        "sync_features": (sequence.sync_seq_len, config.sync_dim),
    }
    return shapes if video else {key: shapes[key] for key in SOUND_KEYS}


def table_path(folder: Path) -> Path:
    """Return the table that belongs to a memmap: beside the folder, with its name."""
    folder = real_path(folder)
    return folder.parent / f"{folder.name}.tsv"


def manifest_path(folder: Path) -> Path:
    """Return the manifest that an extraction has left beside a memmap; those of other programs have none."""
    folder = real_path(folder)
    return folder.parent / f"{folder.name}.manifest.jsonl"


def record_path(folder: Path) -> Path:
    """Return the record of its rows that an extraction has left beside a memmap; those of other programs have none."""
    folder = real_path(folder)
    return folder.parent / f"{folder.name}.{RECORD_SUFFIX}"


def row_prompts_path(folder: Path) -> Path:
    """Return the list of prompts (``id: prompt``) that may lie beside a memmap, with several for a row, say."""
    folder = real_path(folder)
    return folder.parent / f"{folder.name}.prompts.txt"


def partial_path(folder: Path) -> Path:
    """Return the folder of a memmap while it is being written: beside its own."""
    folder = real_path(folder)
    return folder.parent / f"{folder.name}.partial"


class MemmapDataset(ClipDataset):
    """The rows of a memmap, 8 s each. ``prompts`` are the table's; a clip has the one that its features were made of.

    Args:
        folder: holds ``meta.json``; the table lies beside it, ``<folder>.tsv``.
        variant: whose latents and features these have to be.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: damaged files, shapes of another variant, or a table of another length; names all such problems.
    """

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.folder, self.sequence = folder, sequence_config(variant.mode)
        meta = _read_meta(folder)
        self.has_video = any(key in meta for key in VIDEO_KEYS)
        keys = tuple(row_shapes(variant, self.has_video))
        self.widths = {"clip": variant.generator.clip_dim, "sync": variant.generator.sync_dim}
        _check_meta(folder, meta, keys, row_shapes(variant, self.has_video), variant.name)
        self.rows = {key: _open(folder / f"{key}.memmap", meta[key]) for key in keys}  # each (n, ·, ·)
        self._ids, self.prompts = _read_table(table_path(folder))
        if len(self._ids) != len(self.rows["mean"]):
            raise UserError(f"{table_path(folder)}: has {counted(len(self._ids), 'row')}, but the tensors in {folder} "
                            "have "
                             f"{len(self.rows['mean'])}; they belong to different extractions")

    @property
    def ids(self) -> list[str]:
        return self._ids

    @functools.cached_property
    def encoded_prompts(self) -> list[str]:
        """The prompts whose text features the rows hold: those of the extraction, where labels were edited after it.

        Without a record of it, those of the table.
        """
        path = record_path(self.folder)
        try:
            record = json.loads(path.read_bytes())
            rows = [(row[0], row[1]) for row, digest in zip(record["plan"]["rows"], record["digests"], strict=True)
                    if digest is not None]
        except FileNotFoundError:
            return self.prompts
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            log.warning("%s: cannot be read (%s), so labels that were edited after the extraction are trained on with "
                        "the text features of before; extract again", path, error)
            return self.prompts
        if len(rows) != len(self):  # of another set
            return self.prompts
        return [str(encoded) if made == clip_id else prompt
                for (made, encoded), clip_id, prompt in zip(rows, self._ids, self.prompts, strict=True)]

    @property
    def edited(self) -> list[str]:
        """The ids of rows whose label was edited after the extraction."""
        return [clip_id for clip_id, prompt, encoded in zip(self._ids, self.prompts, self.encoded_prompts, strict=True)
                if prompt != encoded]

    def __len__(self) -> int:
        return len(self._ids)

    def origins(self, index: int) -> tuple[str, ...]:
        """Return the video or recording of a row, where a manifest names it, and its sound."""
        source = self._sources.get(self._ids[index])
        return (f"row {self._sounds[index]}", *([f"source {source}"] if source else []))

    def content(self, index: int) -> dict[str, str]:
        """Return hashes of the middle of a row: the whole of a large set takes too long to read at every start."""
        features = [key for key in VIDEO_KEYS if key in self.rows]
        hashes = {"sound": self._sample(index, ("mean", "std")), "prompt": repr(self.prompts[index])}
        return hashes | ({"features": self._sample(index, features)} if features else {})

    def _sample(self, index: int, keys: Sequence[str]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for key in keys:
            middle = max(0, self.rows[key].shape[1] - SAMPLED_TOKENS) // 2
            digest.update(self.rows[key][index, middle : middle + SAMPLED_TOKENS].data)
        return digest.hexdigest()

    @functools.cached_property
    def _sounds(self) -> list[str]:
        """Hashes of the latents of all rows: of their middle, and of all of it where that is equal."""
        hashes = [self._sample(index, ("mean",)) for index in range(len(self))]
        counts = Counter(hashes)
        return [
            hashlib.blake2b(self.rows["mean"][index].data, digest_size=16).hexdigest()
            if counts[one] > 1 else one for index, one in enumerate(hashes)
        ]

    @functools.cached_property
    def _sources(self) -> dict[str, str]:
        """The file that each row is from, by id; empty without a manifest."""
        path = manifest_path(self.folder)
        try:
            rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
            return {str(row["id"]): str(row["source"]) for row in rows}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s: cannot be read (%s), so some rows of a video may be trained on while others are held out",
                        path, error)
            return {}

    def lengths(self, index: int) -> Lengths:
        return self.sequence.latent_seq_len, self.sequence.clip_seq_len, self.sequence.sync_seq_len

    def num_windows(self, index: int) -> int:
        return 1

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        assert window == 0, window
        row = {key: torch.from_numpy(values[index]) for key, values in self.rows.items()}
        bad = [key for key, value in row.items() if not _is_finite(value)]
        if bad:  # its update will be skipped
            log.warning("%s: row %d (%s) has values that are not finite in %s; extract it again, or leave it out",
                        self.folder, index, self._ids[index], " and ".join(bad))
        return TrainingClip(
            id=self._ids[index], prompt=self.encoded_prompts[index], audio_path=None, sequence=self.sequence,
            mean=row["mean"], std=row["std"], text_f=row["text_features"],
            clip_f=row.get("clip_features", _absent(self.sequence.clip_seq_len, self.widths["clip"])),
            sync_f=row.get("sync_features", _absent(self.sequence.sync_seq_len, self.widths["sync"])),
            has_video=self.has_video,
        )


def _is_finite(values: Tensor) -> bool:
    """Return True if all values are numbers: their sum is none if one of them is not, and takes a tenth of the time."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def _absent(tokens: int, width: int) -> Tensor:
    """Return the NaN features of a video that does not exist, see :class:`TrainingClip`."""
    return torch.tensor(math.nan).expand(tokens, width)


def _read_meta(folder: Path) -> dict[str, Any]:
    """Return the entries of ``meta.json`` that describe tensors."""
    path = folder / META_FILE
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); copy the folder again") from error
    entries = meta.items() if isinstance(meta, dict) else ()
    tensors = {k: v for k, v in entries if isinstance(v, dict) and _is_shape(v.get("shape"))}
    if not tensors:
        raise UserError(f"{path}: describes no tensors, so {folder} is not a TensorDict memmap; expected one, or a "
                         "folder of .npz files from extract_features.py")
    return tensors


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)


def _check_meta(
    folder: Path, meta: dict[str, Any], keys: tuple[str, ...], row_shapes: dict[str, tuple[int, int]], variant: str
) -> None:
    """Raise one ValueError with everything that is wrong with the described tensors."""
    missing = [key for key in keys if key not in meta]
    problems = [f"{' and '.join(missing)} missing (found: {', '.join(meta)})"] if missing else []
    num_rows = {meta[key]["shape"][0] for key in keys if key in meta and meta[key]["shape"]}
    if len(num_rows) > 1:
        problems.append(f"tensors of {', '.join(map(str, sorted(num_rows)))} rows, expected the same number")
    for key in keys:
        if key not in meta:
            continue
        shape, dtype = meta[key]["shape"], meta[key].get("dtype")
        if tuple(shape[1:]) != row_shapes[key]:
            expected = ", ".join(map(str, row_shapes[key]))
            problems.append(f"{key} is {tuple(shape)}, expected (n, {expected}) for {variant}")
        if dtype != "torch.float32":
            problems.append(f"{key} is {dtype}, expected torch.float32")
    if problems:
        raise UserError(f"{folder / META_FILE}: {'; '.join(problems)}")


def _open(path: Path, entry: dict[str, Any]) -> RowFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, although {META_FILE} names it; copy the folder again")
    return RowFile(path, tuple(entry["shape"]))


def _read_table(path: Path) -> tuple[list[str], list[str]]:
    """Return the ids and the labels or captions of a table with a header, one row per clip."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it belongs beside the folder and names the clip of every row")
    table = read_text_table(path, "\t", ("id",), "id and label (or caption)")
    text = next((column for column in TEXT_COLUMNS if column in table.columns), None)
    if text is None:
        raise UserError(f"{path}: has the columns {', '.join(table.columns)}, expected id and label (or caption)")
    refuse_long_rows(path, table)
    ids, texts = [], []
    for line, cells in table.rows:
        clip_id, label = cells["id"], cells[text]
        if clip_id is None or label is None:
            raise UserError(f"{path}, line {line}: has fewer columns than the header")
        ids.append(clip_id)
        texts.append(label)
    return ids, texts
