"""Cache folders and results of av-benchmark, so that either program continues the other's work.

    <folder>/pann_features.pth, vggish_features.pth, ... : name of a clip -> tensor
    two folders -> output_metrics.json

av-benchmark (github.com/hkchengrex/av-benchmark) is the program with which MMAudio's paper was evaluated. Its files are
dictionaries written by ``torch.save``; nothing in them is executed. What it replaces or leaves out in silence is named
here instead.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selva.evaluation import distances
from selva.evaluation.desync import decisions
from selva.models.synchformer_av import SynchformerAV
from selva.utils.errors import UserError
from selva.utils.files import atomic_path, atomic_write_text
from selva.utils.text import listed
from selva.utils.torch_files import read_torch, write_torch

log = logging.getLogger(__name__)

RESULT_FILE = "output_metrics.json"
PANN, VGGISH = "pann_features", "vggish_features"
PASST, PASST_LOGITS = "passt_features_embed", "passt_logits"
SYNC_AUDIO, SYNC_VIDEO = "synchformer_audio", "synchformer_video"
COSINES = {  # entry of the result: file of the generated sounds, file of the reference
    "IB-Score": ("imagebind_audio", "imagebind_video"),
    "LAION-CLAP-Score": ("clap_laion_audio", "clap_laion_text"),
    "MS-CLAP-Score": ("clap_ms_audio", "clap_ms_text"),
}
RESULT_KEYS = (
    "FD-VGG", "FD-PANN", "FD-PASST", "KL-PANNS-softmax", "KL-PASST-softmax", "ISC-PANNS-mean", "ISC-PANNS-std",
    "ISC-PASST-mean", "ISC-PASST-std", "IB-Score", "DeSync", "LAION-CLAP-Score", "MS-CLAP-Score",
)
PANN_ENTRIES = ("logits", "2048", "clipwise_output")
# Names of VGGSound clips that the program's other tools decorate: length of the decorated name -> the part that counts.
DECORATED = {30: slice(10, 28), 20: slice(0, 18), 21: slice(1, 19)}

Rows = dict[str, np.ndarray]  # name of a clip -> its features


# ---------------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------------


def read_cache(folder: Path, name: str, entry: str | None = None) -> Rows | None:
    """Return the features of every clip in ``folder/name.pth``, float32, or None if there is no such file.

    Args:
        entry: of a file that holds several features per clip (``pann_features``): which.

    Raises:
        UserError: the file is damaged, holds something else, or values that are not finite; names the clip.
    """
    path = folder / f"{name}.pth"
    if not path.is_file():
        return None
    content = read_torch(path)
    if not content:
        raise UserError(f"{path}: holds nothing, expected name -> tensor")
    rows = {}
    for clip, value in content.items():
        if entry is not None:
            value = value.get(entry) if isinstance(value, Mapping) else None
        if not isinstance(clip, str) or not isinstance(value, Tensor) or value.numel() == 0:
            part = f", entry {entry!r}," if entry else ""
            raise UserError(f"{path}: {clip!r}{part} is no tensor with values")
        rows[clip] = value.float().numpy()
        if not np.isfinite(rows[clip]).all():
            raise UserError(f"{path}: the features of {clip!r} hold values that are not finite")
    shapes = {row.shape[1:] if name == VGGISH else row.shape for row in rows.values()}
    if len(shapes) > 1:
        raise UserError(f"{path}: features of unequal shapes {sorted(shapes)}; clips of one length are needed")
    return rows


def write_cache(folder: Path, name: str, rows: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write ``folder/name.pth`` as av-benchmark reads it: each clip a CPU float32 tensor with a storage of its own.

    A tensor that is such a one already is not copied, so that rows on disk stay there until they are written.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    def own(value: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        if isinstance(value, Tensor):
            value = value.detach().float().cpu().contiguous()
            return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        return {key: own(inner) for key, inner in value.items()}  # pyright: ignore[reportReturnType]  -- two levels

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{name}.pth") as path:
        write_torch({key: own(value) for key, value in rows.items()}, path)


def write_results(folder: Path, results: Mapping[str, float]) -> Path:
    """Write ``folder/output_metrics.json`` with the published keys in the published order, and return its path."""
    path = folder / RESULT_FILE
    atomic_write_text(path, json.dumps({key: results[key] for key in RESULT_KEYS if key in results}, indent=2))
    return path


# ---------------------------------------------------------------------------------------------------------------
# pairs
# ---------------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """Return the VGGSound name inside a decorated one; other names as they are.

    av-benchmark goes by the length of the name alone, so that any name of 20, 21 or 30 characters is cut. Pairs are
    therefore looked for under the whole name first, see :func:`pairs`.
    """
    return name[DECORATED[len(name)]] if len(name) in DECORATED else name


def pairs(generated: Sequence[str], reference: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (generated, reference) names that belong together, in the order of the generated ones."""
    known = set(reference)
    found = []
    for name in generated:
        partner = name if name in known else plain_name(name)
        if partner in known:
            found.append((name, partner))
    return found


def _paired(generated: Rows, reference: Rows) -> tuple[np.ndarray, np.ndarray] | None:
    found = pairs(list(generated), list(reference))
    if not found:
        return None
    return np.stack([generated[a] for a, _ in found]), np.stack([reference[b] for _, b in found])


# ---------------------------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------------------------


def evaluate_caches(
    generated: Path, reference: Path, synchformer: SynchformerAV | None = None, *, paired: bool = True
) -> dict[str, float]:
    """Return the metrics of two cache folders under av-benchmark's keys, in its order.

    As there, the Fréchet distances of VGGish and PANNs and the inception score of PANNs cover every clip of both
    folders, and those of PaSST the pairs only. What a missing file makes impossible is left out and named in the log.

    Args:
        synchformer: for DeSync; None leaves it out.
        paired: clips of the same name belong together; False leaves out what needs pairs.

    Raises:
        UserError: no clip of one folder has its partner in the other, too few clips, or a damaged file.
    """
    read = {(side, name): read_cache(folder, name) for side, folder in (("gen", generated), ("ref", reference))
            for name in (VGGISH, PASST, PASST_LOGITS)}
    pann = {(side, entry): read_cache(folder, PANN, entry) for side, folder in (("gen", generated), ("ref", reference))
            for entry in ("2048", "logits")}
    results: dict[str, float] = {}

    def both(files: Mapping[tuple[str, str], Rows | None], name: str) -> tuple[Rows, Rows] | None:
        rows = files["gen", name], files["ref", name]
        return None if rows[0] is None or rows[1] is None else (rows[0], rows[1])

    if vggish := both(read, VGGISH):
        results["FD-VGG"] = distances.frechet_distance(*(np.concatenate(list(rows.values())) for rows in vggish))
    if embeddings := both(pann, "2048"):
        results["FD-PANN"] = distances.frechet_distance(*(np.stack(list(rows.values())) for rows in embeddings))
    if embeddings := both(read, PASST):
        sets = _paired(*embeddings) if paired else tuple(np.stack(list(rows.values())) for rows in embeddings)
        results["FD-PASST"] = distances.frechet_distance(*_some(sets, generated, reference))
    for key, files, name in (("KL-PANNS-softmax", pann, "logits"), ("KL-PASST-softmax", read, PASST_LOGITS)):
        if paired and (logits := both(files, name)):
            ours, theirs = _some(_paired(*logits), generated, reference)
            results[key] = float(distances.kl_divergences(theirs, ours).mean())
    for key, rows in (("ISC-PANNS", pann["gen", "logits"]), ("ISC-PASST", read["gen", PASST_LOGITS])):
        if rows is None:
            continue
        partners = read["ref", PASST_LOGITS] if key == "ISC-PASST" else None
        if paired and partners is not None:
            rows = {name: rows[name] for name, _ in pairs(list(rows), list(partners))}
        mean, std = distances.inception_score(np.stack(list(rows.values())))
        results |= {f"{key}-mean": mean, f"{key}-std": std}
    if paired:
        results |= _paired_scores(generated, reference, synchformer)
    missing = [key for key in RESULT_KEYS if key not in results]
    if missing:
        log.info("not computed, because features or weights are missing: %s", listed(missing))
    return {key: results[key] for key in RESULT_KEYS if key in results}


def _paired_scores(generated: Path, reference: Path, synchformer: SynchformerAV | None) -> dict[str, float]:
    """Return the cosines of embeddings, and DeSync."""
    results = {}
    for key, (sound, other) in COSINES.items():
        rows = read_cache(generated, sound), read_cache(reference, other)
        if rows[0] is not None and rows[1] is not None:
            results[key] = float(distances.cosines(*_some(_paired(rows[0], rows[1]), generated, reference)).mean())
    audio, video = read_cache(generated, SYNC_AUDIO), read_cache(reference, SYNC_VIDEO)
    if audio is not None and video is not None and synchformer is not None:
        matched = _some(_paired(audio, video), generated, reference)
        sounds, pictures = (torch.from_numpy(rows) for rows in matched)
        results["DeSync"] = float(decisions(synchformer, pictures, sounds).mean())
    return results


def _some(sets: tuple[np.ndarray, ...] | None, generated: Path, reference: Path) -> tuple[np.ndarray, np.ndarray]:
    if sets is None:
        raise UserError(f"no clip of {generated} has the name of a clip of {reference}; they are paired by their names")
    return sets[0], sets[1]


