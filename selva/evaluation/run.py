"""One evaluation from its settings to figures with intervals; behind ``scripts/evaluate.py``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.audio.loudness import BLOCK_SEC
from selva.audio.metrics import SILENCE_DB
from selva.evaluation import av_benchmark, distances, encoders, intervals
from selva.evaluation.config import EvaluationConfig
from selva.evaluation.desync import decisions
from selva.evaluation.intervals import Figure
from selva.evaluation.sounds import LENGTHS_DIFFER_SEC, SoundPair, at_rate, find_pairs, pair_figures, read_mono
from selva.evaluation.store import PairStore
from selva.models.synchformer_av import SAMPLE_RATE, SEGMENT_SAMPLES, SEGMENT_STEP, SEGMENTS_COMPARED, SynchformerAV
from selva.utils.device import resolve_device
from selva.utils.errors import UserError
from selva.utils.files import check_can_write, source_hash
from selva.utils.progress import Progress
from selva.utils.text import counted, listed
from selva.weights.find import content_mark

log = logging.getLogger(__name__)

FORMAT = 2  # of the records; raised when a figure is computed in another way
KERNEL_ITEMS = 4000  # of each set at most, for the kernel distance: it compares each with each
DESYNC_SEC = (SEGMENTS_COMPARED - 1) * SEGMENT_STEP / SAMPLE_RATE + SEGMENT_SAMPLES / SAMPLE_RATE  # 4.8

# Figures of pairs: key of a record, and whether its absolute value counts.
PAIRED = {
    "log_spectral_distance_db": False, "mel_cepstral_distortion_db": False, "stft_distance": False, "onset_f1": False,
    "onset_offset_sec": True, "loudness_difference_lu": True, "centroid_difference_oct": True,
    "silent_share_difference": True, "desync_sec": False, "clap_score": False, "ast_kl": False,
}


@dataclass
class Evaluation:
    """The results of an evaluation.

    Attributes:
        generated, reference: the folders that were compared.
        figures: key -> figure with its interval; keys of ``PAIRED``, and ``<network>_fd``, ``<network>_kd``,
            ``ast_is``.
        pairs: (pair, figures of it), in the order of the names; those that failed are not among them.
        failed: (name, reason). remarks: sentences about what was left out or is odd.
        reasons: key -> why a figure is missing.
    """

    generated: Path
    reference: Path
    figures: dict[str, Figure] = field(default_factory=dict)
    pairs: list[tuple[SoundPair, dict[str, Any]]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def evaluate(config: EvaluationConfig) -> Evaluation:
    """Compare every generated sound with its recording and return the figures.

    Pairs that a stopped evaluation of the same output folder measured are taken from there, if the content of all files
    is the same.

    Raises:
        UserError: no sounds, no pairs, no pair that could be measured, or a network that cannot be read.
        FileNotFoundError: a folder or a file that is named does not exist.
    """
    pairs = find_pairs(config.generated, config.reference, config.videos, config.captions)
    check_can_write(config.output_dir)
    networks = _Networks(config)
    store, result = PairStore(config.output_dir), Evaluation(config.generated, config.reference)
    records, kept = [], 0
    with Progress(len(pairs), "comparing", "pairs") as progress:
        for number, pair in enumerate(pairs, 1):
            try:
                key = networks.key(pair)
                record = store.done.get(key)
                if record is None or networks.lacks_export(record):
                    record = store.add(key, *networks.measure(pair))
                else:
                    kept += 1
                records.append(record)
                result.pairs.append((pair, record["figures"]))
            except (UserError, OSError) as error:
                result.failed.append((pair.name, str(error)))
                log.warning("%s: left out: %s", pair.name, error)
            progress.update(number)
    if kept:
        log.info("measured already in an earlier run: %d of %s", kept, counted(len(pairs), "pair"))
    if not records:
        raise UserError(f"no pair of {len(pairs)} could be compared; the first reason: {result.failed[0][1]}")
    networks.write_exports(store, result.pairs, records)
    _summarise(result, records, store)
    _remark(result)
    return result


# ---------------------------------------------------------------------------------------------------------------
# one pair
# ---------------------------------------------------------------------------------------------------------------


class _Networks:
    """The networks that were asked for, and the measurements of one pair with them."""

    def __init__(self, config: EvaluationConfig) -> None:
        device = resolve_device(config.device)
        self.config = config
        self.synchformer: SynchformerAV | None = None
        if config.synchformer is not None:
            self.synchformer = encoders.load_synchformer(config.synchformer, device)
        self.clap = encoders.Clap(config.clap, device) if config.clap is not None else None
        self.ast = encoders.Ast(config.ast, device) if config.ast is not None else None
        if config.export_av_benchmark is not None and self.synchformer is None:
            raise UserError("--export_av_benchmark writes Synchformer's features, which need --synchformer")
        self._identity = [FORMAT, *(_identity(path) for path in (config.synchformer, config.clap, config.ast))]

    def key(self, pair: SoundPair) -> str:
        """Return a text that changes with everything that the measurements of a pair depend on."""
        files = [pair.generated, pair.reference, pair.video if self.synchformer is not None else None]
        caption = pair.caption if self.clap is not None else None
        return " ".join(map(str, [*self._identity, *(source_hash(f) if f else "-" for f in files), caption, pair.name]))

    def measure(self, pair: SoundPair) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the figures of a pair, and the features of both sounds by kind and side."""
        sounds = {"generated": read_mono(pair.generated), "reference": read_mono(pair.reference)}
        rate = min(rate for _, rate in sounds.values())
        generated, reference = (at_rate(sound, own, rate) for sound, own in sounds.values())
        figures = pair_figures(generated, reference, rate)
        figures["rate_hz"] = rate
        features: dict[str, np.ndarray] = {}
        if self.clap is not None:
            for side, (sound, own) in sounds.items():
                features[f"clap_{side}"] = self.clap.sound(at_rate(sound, own, encoders.CLAP_RATE))
            if pair.caption is not None:
                text = self.clap.text(pair.caption)
                figures["clap_score"] = float(distances.cosines(features["clap_generated"][None], text[None])[0])
        if self.ast is not None:
            for side, (sound, own) in sounds.items():
                logits, embedding = self.ast.sound(at_rate(sound, own, encoders.AST_RATE))
                features |= {f"astlogits_{side}": logits, f"ast_{side}": embedding}
            figures["ast_kl"] = float(distances.kl_divergences(
                features["astlogits_reference"][None], features["astlogits_generated"][None])[0])
        if self.synchformer is not None:
            figures |= self._desync(self.synchformer, pair, sounds["generated"], features)
        return figures, features

    def _desync(
        self, network: SynchformerAV, pair: SoundPair, sound: tuple[Tensor, int], features: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        if pair.video is None:
            return {"desync_problem": "no video of that name (--videos)"}
        mono = at_rate(*sound, SAMPLE_RATE)
        seconds = len(mono) / SAMPLE_RATE
        if seconds < DESYNC_SEC:
            return {"desync_problem": f"{seconds:.2f} s, DeSync needs {DESYNC_SEC:g} s"}
        visual = encoders.video_features(network, pair.video, seconds)
        audio = encoders.sync_audio_features(network, mono)
        if len(visual) < SEGMENTS_COMPARED:
            return {"desync_problem": f"its video covers less than {DESYNC_SEC:g} s"}
        if self.config.export_av_benchmark is not None:
            # Clips of other lengths have other widths, so they are kinds of their own.
            features |= {_export_kind(side, x.shape): x.flatten().numpy()
                         for side, x in (("generated", audio), ("reference", visual))}
        found = decisions(network, visual[None], audio[None])[0]
        return {"desync_sec": float(found.mean())}

    def lacks_export(self, record: Mapping[str, Any]) -> bool:
        """Return True if features of a pair are to be exported that an earlier evaluation did not keep."""
        return (self.config.export_av_benchmark is not None and "desync_problem" not in record["figures"]
                and not _exports(record, "generated"))

    def write_exports(
        self, store: PairStore, pairs: Sequence[tuple[SoundPair, Any]], records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write Synchformer's features as av-benchmark's cache folders, if that was asked for."""
        folder = self.config.export_av_benchmark
        if folder is None:
            return
        for side, name in (("generated", av_benchmark.SYNC_AUDIO), ("reference", av_benchmark.SYNC_VIDEO)):
            av_benchmark.write_cache(folder / side, name, {
                pair.name: torch.from_numpy(store.row(record, kind).reshape(shape))
                for (pair, _), record in zip(pairs, records, strict=True)
                for kind, shape in _exports(record, side)})
        log.info("av-benchmark's cache folders: %s, %s", folder / "generated", folder / "reference")


def _export_kind(side: str, shape: Sequence[int]) -> str:
    return "_".join(["sync", side, *map(str, shape)])


def _exports(record: Mapping[str, Any], side: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return (kind, shape) of the features of a record that are exported for a side: one or none."""
    begin = _export_kind(side, ()) + "_"
    return [(kind, tuple(map(int, kind.removeprefix(begin).split("_")))) for kind in record["features"]
            if kind.startswith(begin)]


def _identity(path: Path | None) -> str:
    """Return a text that tells weights apart: those of a file, or of all files of a folder."""
    if path is None:
        return "-"
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return "+".join(content_mark(file) for file in files)


# ---------------------------------------------------------------------------------------------------------------
# all pairs
# ---------------------------------------------------------------------------------------------------------------


def _summarise(result: Evaluation, records: list[dict[str, Any]], store: PairStore) -> None:
    for key, absolute in PAIRED.items():
        values = np.array([_number(record["figures"].get(key)) for record in records])
        if np.isnan(values).all():
            continue
        result.figures[key] = intervals.mean_figure(np.abs(values) if absolute else values)
    for network in ("clap", "ast"):
        generated = store.features(records, f"{network}_generated")
        reference = store.features(records, f"{network}_reference")
        if generated is None or reference is None:
            continue
        if reason := distances.too_few_for_frechet(generated, reference):
            result.reasons[f"{network}_fd"] = reason
        else:
            result.figures[f"{network}_fd"] = intervals.frechet_figure(generated, reference, paired=True)
        _try(result, f"{network}_kd", lambda a=generated, b=reference: _kernel(result, a, b))
    logits = store.features(records, "astlogits_generated")
    if logits is not None:
        _try(result, "ast_is", lambda: Figure(distances.inception_score(logits)[0], None, None, len(logits)))


def _try(result: Evaluation, key: str, compute: Callable[[], Figure]) -> None:
    try:
        result.figures[key] = compute()
    except UserError as error:
        result.reasons[key] = str(error)


def _kernel(result: Evaluation, generated: np.ndarray, reference: np.ndarray) -> Figure:
    if len(generated) > KERNEL_ITEMS:
        chosen = np.sort(np.random.default_rng(intervals.SEED).permutation(len(generated))[:KERNEL_ITEMS])
        remark = f"kernel distances are computed from {KERNEL_ITEMS} pairs, drawn at random from all {len(generated)}"
        if remark not in result.remarks:
            result.remarks.append(remark)
        generated, reference = generated[chosen], reference[chosen]
    return intervals.kernel_figure(distances.kernel_terms(reference, generated), paired=True)


def _number(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _silent(level_db: float | None) -> bool:
    return level_db is None or level_db < SILENCE_DB


def _remark(result: Evaluation) -> None:
    """Say what is odd about the sounds, by name, in the log and in the result."""
    def named(test: Callable[[dict[str, Any]], bool]) -> list[str]:
        return [pair.name for pair, figures in result.pairs if test(figures)]

    for names, text in (
        (named(lambda f: f["rms_db"] is None), "generated sound is digital silence, and has no distances"),
        (named(lambda f: f["rms_db"] is not None and f["centroid_hz"] is None),
         f"generated sound is below {SILENCE_DB:.0f} dB of full scale, and has no distances"),
        (named(lambda f: _silent(f["reference_rms_db"])), "recording is silent"),
        (named(lambda f: f["common_sec"] < BLOCK_SEC),
         f"the sounds have less than {BLOCK_SEC} s in common, too little for loudness and spectral distances"),
        (named(lambda f: f["common_sec"] >= BLOCK_SEC and f["log_spectral_distance_db"] is None
               and not _silent(f["rms_db"]) and not _silent(f["reference_rms_db"])),
         "one of the sounds is silent in their common beginning, and there are no distances"),
        (named(lambda f: abs(f["length_difference_sec"]) > LENGTHS_DIFFER_SEC),
         "lengths differ; the common beginning was compared"),
    ):
        if names:
            result.remarks.append(f"{len(names)} of {counted(len(result.pairs), 'pair')}: {text}: {listed(names)}")
    problems: dict[str, list[str]] = {}
    for pair, figures in result.pairs:
        if "desync_problem" in figures:
            problems.setdefault(figures["desync_problem"], []).append(pair.name)
    result.remarks += [f"no DeSync: {reason}: {listed(names)}" for reason, names in problems.items()]
    for remark in result.remarks:
        log.warning("%s", remark)
    for key, reason in result.reasons.items():
        log.warning("no %s: %s", key, reason)
