"""One call of ``infer.py`` from its settings to the written sounds."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from selva.extraction.manifest import MANIFEST_FILE, check_replaceable
from selva.inference.batch import BatchClip, BatchManifest, SoundBatch, common_clip_features
from selva.inference.compare import check_reference_dir, write_comparison
from selva.inference.config import InferenceConfig
from selva.inference.engine import SoundGenerator, uses_clip_features
from selva.inference.plan import adapter_setups, check_names, collect_requests, plan_clip
from selva.inputs.table import TABLE_SUFFIXES
from selva.utils.device import peak_memory_bytes
from selva.utils.text import counted

log = logging.getLogger(__name__)


def generate(config: InferenceConfig, announce: Callable[[Path], None] = lambda path: None) -> int:
    """Make and write the sounds that the settings ask for; return the number of clips that failed.

    Args:
        announce: called with the path of every sound and video when it is written.

    Raises:
        UsageError: the settings ask for something that cannot be meant.
        ValueError, FileNotFoundError: adapters or weights cannot be used.
    """
    if config.reference:
        check_reference_dir(config.reference)
    setups = adapter_setups(config)
    config = dataclasses.replace(config, clip_features=common_clip_features(config.clip_features, setups))
    generator = SoundGenerator(
        config.model.variant, config.model.selva_dir, clip_features=config.clip_features, sampling=config.sampling,
        long=config.long, normalize=config.normalize, target=config.target, device=config.model.device,
        precision=config.precision, base_dtype=config.base_dtype, batch_size=config.batch_size, offload=config.offload,
        generator=config.model.generator, cuda_graph=config.cuda_graph,
    )
    config = dataclasses.replace(config, precision=generator.precision_name)  # for the settings beside the sounds
    clips = [plan_clip(config, name, request, setups) for name, request in collect_requests(config).items()]
    check_names(config, clips)
    lists = any(path.is_dir() or path.suffix.lower() in TABLE_SUFFIXES for path in (*config.inputs, *config.features))
    manifest = BatchManifest(config.output, len(clips))
    is_batch = not config.output_is_file and (lists or len(clips) > 1)
    if is_batch:
        check_replaceable(config.output / MANIFEST_FILE)

    def report(clip: BatchClip) -> None:
        for path in clip.paths:
            announce(path)
        if is_batch:
            manifest.add(clip)

    needs_clip = any(uses_clip_features(config.clip_features, generator.variant, s.adapters, config.model.generator)
                     for s in setups)
    generator.check_weights(any(clip.request.video for clip in clips), needs_clip)
    SoundBatch(generator, setups, overwrite=config.overwrite, on_clip=report).run(clips)
    if config.compare and any(clip.made for clip in clips):
        with generator.times.stage("comparing"):
            for path in write_comparison(config.output, clips, setups, config.reference):
                announce(path)
    return _log_outcome(clips, generator)


def _log_outcome(clips: Sequence[BatchClip], generator: SoundGenerator) -> int:
    """Log the outcome of all clips; return the number of clips that failed."""
    failed, kept = sum(bool(clip.problem) for clip in clips), sum(clip.kept for clip in clips)
    made = sum(len(clip.made) for clip in clips) - kept
    log.info("%d made, %d already there, %d of %s failed", made, kept, failed, counted(len(clips), "clip"))
    if made:
        log.info("%s; peak memory %.2f GiB", generator.times, peak_memory_bytes(generator.device) / 2**30)
    return failed
