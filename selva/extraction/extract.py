"""One extraction from its settings to feature files or a memmap; behind ``extract_features.py``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from selva.data.latents import FRONT_END
from selva.data.memmap.labels import labels_or_fallback
from selva.data.memmap.reader import row_prompts_path
from selva.extraction.audio_set import AudioSetExtractor, plan_audio_set, run_sounds
from selva.extraction.clip_table import TABLE_FILE, ClipOrigin, write_clip_table
from selva.extraction.config import ExtractionConfig
from selva.extraction.extractor import EXTRACTION_VERSION, FeatureExtractor
from selva.extraction.leftovers import report_leftovers
from selva.extraction.manifest import FAILED, SKIPPED, ManifestWriter, Outcome, Shard, read_manifest
from selva.extraction.outputs import FeatureFiles, MemmapRows, beside_memmap, memmap_manifest, publish
from selva.extraction.pipeline import ClipEncoder, Summary, run
from selva.extraction.reader import ClipReader, ReadSettings, default_workers, digest_of, read_clips
from selva.inputs.file_names import names_that_collide
from selva.inputs.jobs import ClipJob, collect_jobs
from selva.models.prompt_length import warn_of_cut_prompts
from selva.models.variants import Variant, get_variant
from selva.utils.device import dtype_of, resolve_device
from selva.utils.errors import UsageError
from selva.utils.files import atomic_write_text, real_path
from selva.utils.progress import StageTimes
from selva.utils.settings import settings_text, values_of
from selva.utils.text import clock, counted, listed
from selva.utils.torchrun import is_main_process
from selva.weights.find import check_weights, encoders_identity, weights_identity

log = logging.getLogger(__name__)

CONFIG_FILE = "extract_config.yaml"

ManifestRow = tuple[str, str, float | None]  # id, source, start


def extract(
    config: ExtractionConfig, announce: Callable[[Path], None] = lambda path: None, debug: bool = False
) -> bool:
    """Extract what the settings ask for; return True where a clip failed.

    Args:
        announce: called with the path of every file or data set when it is written.
        debug: worker processes show their debug messages too.

    Raises:
        UsageError: the settings ask for nothing, for something that does not exist, or for two clips of one name.
        ValueError, FileNotFoundError: tables or weights cannot be used.
    """
    device = resolve_device(config.model.device)
    extractor = FeatureExtractor(
        get_variant(config.model.variant), config.model.selva_dir, device, dtype_of(config.precision)
    )
    if config.recordings:
        return _extract_sounds(config, extractor, announce)
    return _extract_videos(config, extractor, announce, debug)


def work_list(config: ExtractionConfig) -> list[ClipJob]:
    """Return the clips that the arguments ask for.

    Raises:
        UsageError: they ask for nothing, for something that does not exist, or for two clips of one name.
    """
    try:
        jobs = collect_jobs(
            config.inputs, recursive=config.recursive, prompt=config.prompt, prompts=config.prompts,
            start_sec=config.start, duration_sec=config.duration, windows=config.windows, overlap_sec=config.overlap,
            mask=config.masks.mask, name=config.name,
            name_dir=config.output_dir if config.format == "npz" else None, video_dir=config.video_dir,
            audio_dir=config.audio_dir, sound_only=config.sound_only,
        )
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    together = names_that_collide((job.id for job in jobs), config.output_dir) if config.format == "npz" else []
    if together:
        raise UsageError(f"{config.output_dir}: upper and lower case are the same in this folder, so one would replace "
                         f"the other: {listed([' and '.join(pair) for pair in together])}; rename one of them")
    if config.sound_only and (masked := [job.id for job in jobs if job.mask]):
        log.warning("the masks of %s are not used, as pictures do not count (--sound_only): %s",
                    counted(len(masked), "clip"), listed(masked))
        jobs = [replace(job, mask=None) for job in jobs]
    for job in jobs:
        config.masks.of_clip(job.mask)  # says what is wrong with them
    if config.format == "memmap":
        if several := [job.id for job in jobs if job.other_prompts]:
            log.warning("a row of a memmap holds one prompt, so the others of %s are not in it; to train with them, "
                        "put a list of all prompts beside it, as %s: %s", counted(len(several), "clip"),
                        row_prompts_path(config.output_dir), listed(several))
        rows = [(job.id, job.prompt) for job in jobs]
        labels = labels_or_fallback(rows, real_path(config.output_dir).name)
        return [replace(job, prompt=label, other_prompts=()) for job, label in zip(jobs, labels, strict=True)]
    without = sum(not job.prompt for job in jobs)
    if without:
        log.warning("no prompt for %d of %s: the model cannot connect these sounds with words. Give --prompt or "
                    "--prompts", without,
                    counted(len(jobs), "clip"))
    return jobs


def open_output(
    config: ExtractionConfig, variant: Variant, jobs: list[ClipJob], weights: str
) -> FeatureFiles | MemmapRows:
    """Return the output for the features; the settings of the run are written beside it."""
    if config.format == "memmap":
        settings = {"extraction_version": EXTRACTION_VERSION, "encoders": encoders_identity(variant),
                    "mode": variant.mode, "precision": config.precision, "front_end": FRONT_END}
        masks = [config.masks.mask_strength, config.masks.mask_clip, config.masks.mask_sync]
        recipe = [[job.start_sec, masks if job.mask else None] for job in jobs]
        output = MemmapRows(config.output_dir, variant, jobs, settings, digest_of({"rows": recipe, "weights": weights}))
    else:
        output = FeatureFiles(config.output_dir, variant, weights)
    write_config(output.beside(CONFIG_FILE), config)
    return output


def write_config(path: Path, config: ExtractionConfig) -> None:
    """Write the settings that all processes of a run share."""
    if is_main_process():
        atomic_write_text(path, settings_text({**values_of(config), "shard": None}))


def open_manifest_writer(
    config: ExtractionConfig, manifest: Path, state: Path, rows: list[ManifestRow], prompts: list[str]
) -> ManifestWriter:
    """Return the writer of the manifest for this process's share of the work list."""
    index, count = config.part
    settings = {name: str(value) for name, value in values_of(config).items() if name in (
        "format", "audio", "latents", "variant", "precision", "mask_strength", "mask_clip", "mask_sync")}
    settings |= {"audio_dir": str(config.audio_dir)} if config.audio_dir else {}
    return ManifestWriter(manifest, state, rows, [settings, prompts], Shard.of_process(index, count))


def list_clips(table: Path, state: Path, manifest: Path, origins: list[ClipOrigin]) -> None:
    """Write the table of the clips beside a complete manifest, and say where it is."""
    try:
        if write_clip_table(table, state, read_manifest(manifest), origins):
            log.info("table of the clips, and what each is made of: %s", table)
    except OSError as error:  # the clips are there all the same
        log.warning("%s: cannot be written (%s)", table, error.strerror or error)


def report(
    summary: Summary, outcome: Outcome | None, manifest: Path, shard: Shard, *, sounds: bool = False,
    kind: str = "video",
) -> None:
    """Log the times, the counts of this process and of all together, and the state of the manifest."""
    log.info("%s", summary.table())
    share = f" (part {shard.index + 1} of {shard.count})" if shard.count > 1 else ""
    log.info("%d extracted, %d already current, %d left out, %d failed, in %s%s", summary.extracted, summary.current,
             summary.skipped, summary.failed, clock(summary.elapsed_sec), share)
    if summary.scaled:
        most = 20 * math.log10(max(summary.scaled)[0])
        log.info("%s went beyond full scale when decoded, by up to %.1f dB, and %s scaled to fit: %s",
                 counted(len(summary.scaled), "sound"), most, "was" if len(summary.scaled) == 1 else "were",
                 listed([name for _, name in sorted(summary.scaled, reverse=True)], 5))
    if summary.unused and sounds:
        log.warning("only the beginning of %s is used, while the caption may be about all of it; cut shorter with "
                    "partition_clips.py: %s", counted(len(summary.unused), "longer clip"), listed(summary.unused))
    elif summary.unused:
        log.warning("only the beginning of %s is used; --windows makes clips of the whole length: %s",
                    counted(len(summary.unused), f"longer {kind}"), listed(summary.unused))
    if summary.silent:
        log.warning("%s silent, and training will refuse %s: %s",
                    counted(len(summary.silent), "clip is", "clips are"),
                    "it" if len(summary.silent) == 1 else "them", listed(summary.silent))
    if outcome is None:
        log.error("stopped at the first clip that failed (--strict)")
    elif not outcome.complete:
        log.info("this part is finished; the manifest will be complete when %s %s too",
                 "part" if len(outcome.unfinished) == 1 else "parts",
                 f"{listed(list(map(str, outcome.unfinished)))} {'is' if len(outcome.unfinished) == 1 else 'are'}")
    else:
        if shard.count > 1:
            log.info("all %s together: %s, of which %d failed and %d were left out", counted(shard.count, "part"),
                     counted(sum(outcome.totals.values()), "clip"), outcome.totals.get(FAILED, 0),
                     outcome.totals.get(SKIPPED, 0))
            if lost := [f"{row['id']} ({row['reason']})" for row in read_manifest(manifest)
                        if row["status"] in (FAILED, SKIPPED)]:  # the other parts have said theirs elsewhere
                log.warning("not in the result: %s", listed(lost, separator="; "))
        log.info("result of every clip: %s", manifest)


def any_failed(summary: Summary, outcome: Outcome | None, shard: Shard) -> bool:
    """Return True where this process has to report a failed clip by its exit code.

    torchrun ends the other processes when one of them fails, so under torchrun the last one to finish speaks for all.
    """
    if outcome is None or len(shard.indices_in_group) == 1:
        return bool(summary.failed)
    return outcome.group_complete and bool(outcome.group_failed)


def _extract_videos(
    config: ExtractionConfig, extractor: FeatureExtractor, announce: Callable[[Path], None], debug: bool
) -> bool:
    """Extract features of videos, or of their sound alone; return True where a clip failed."""
    variant, jobs = extractor.variant, work_list(config)
    latents = config.latents or config.format == "memmap"
    check_weights(variant.name, config.model.selva_dir, config.weight_parts)
    weights = weights_identity(variant, config.model.selva_dir, config.weight_parts)
    output = open_output(config, variant, jobs, weights)
    settings = ReadSettings(
        variant.name, str(extractor.precision).removeprefix("torch."),
        None if config.format == "memmap" else config.output_dir, config.audio or "extract", latents, config.overwrite,
        config.masks.mask_strength, config.masks.mask_clip, config.masks.mask_sync, config.preview,
        weights, config.sound_only,
    )
    reader = ClipReader(jobs, settings, output.digests, output.pairs)
    rows: list[ManifestRow] = [(job.id, str(job.path), job.start_sec) for job in jobs]
    prompts = [job.prompt for job in jobs]
    with open_manifest_writer(config, output.manifest, output.state, rows, prompts) as manifest_writer:
        own = manifest_writer.shard.own(len(jobs))
        workers = config.workers if config.workers is not None else default_workers(len(own))
        warn_of_cut_prompts(((jobs[index].id, jobs[index].prompt) for index in own), extractor.variant.clip)
        encoder = ClipEncoder(extractor, jobs, own, StageTimes())
        clips = read_clips(reader, own, workers, debug)
        summary = run(clips, len(own), encoder, output, manifest_writer, strict=config.strict, announce=announce)
        stopped = config.strict and summary.failed
        outcome = None if stopped else manifest_writer.finish()
        if outcome is not None and outcome.complete and output.pairs is not None:
            report_leftovers(output.pairs, read_manifest(output.manifest), config.prune)
        if outcome is not None and outcome.complete:
            origins = [ClipOrigin(job.id, "" if config.audio == "none" else str(job.sound or job.path), job.prompt,
                                  job.prompt_from) for job in jobs]
            list_clips(output.beside(TABLE_FILE), output.state, output.manifest, origins)
        for path in [] if stopped else output.finish():
            announce(path)
    output.close()
    report(summary, outcome, output.manifest, manifest_writer.shard,
           kind="recording" if config.sound_only else "video")
    return any_failed(summary, outcome, manifest_writer.shard)


def _extract_sounds(
    config: ExtractionConfig, extractor: FeatureExtractor, announce: Callable[[Path], None]
) -> bool:
    """Make a set of sound without pictures; return True where a clip failed."""
    assert config.captions is not None and config.recordings is not None
    jobs = plan_audio_set(config.inputs[0], config.captions, config.recordings, config.recursive)
    check_weights(extractor.variant.name, config.model.selva_dir, config.weight_parts)
    rows: list[ManifestRow] = [(job.window.id, str(job.path or job.window.name), None) for job in jobs]
    workers = config.workers if config.workers is not None else default_workers(len(jobs))
    sounds = AudioSetExtractor(extractor, num_workers=workers)
    with sounds.open_writer(config.output_dir, jobs) as writer:
        manifest, state = memmap_manifest(config.output_dir)
        write_config(beside_memmap(config.output_dir, CONFIG_FILE), config)
        captions = [job.caption for job in jobs]
        with open_manifest_writer(config, manifest, state, rows, captions) as manifest_writer:
            own = manifest_writer.shard.own_groups([job.window.name for job in jobs])  # a recording is read once
            extractor.prepare_texts({jobs[index].caption for index in own}, sync=False)
            results = sounds.run(jobs, writer, own)
            summary = run_sounds(results, len(own), jobs, manifest_writer, config.output_dir.name, config.strict)
            stopped = config.strict and summary.failed
            outcome = None if stopped else manifest_writer.finish()
            if outcome is not None and outcome.complete:
                origins = [ClipOrigin(job.window.id, str(job.path or ""), job.caption, "captions") for job in jobs]
                list_clips(beside_memmap(config.output_dir, TABLE_FILE), state, manifest, origins)
            if not stopped and publish(writer):
                announce(config.output_dir)
    report(summary, outcome, manifest, manifest_writer.shard, sounds=True)
    return any_failed(summary, outcome, manifest_writer.shard)
