"""Plan of a call of ``infer.py``: from its settings to requests, adapters, and the files to write."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from selva.flow import WHOLE_INTERVAL
from selva.inference.batch import AdapterSetup, BatchClip, Variation
from selva.inference.compare import read_compare_list
from selva.inference.config import WHOLE_VIDEO_SEC, InferenceConfig
from selva.inference.engine import load_adapters
from selva.inference.outputs import name_problem, shared_names, sound_files
from selva.inference.request import SoundRequest, warn_of_shorter
from selva.inputs.jobs import ClipJob, collect_jobs
from selva.inputs.suffixes import AUDIO_SUFFIXES
from selva.media.container import video_length
from selva.models.variants import get_variant
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.errors import UsageError
from selva.utils.files import real_path
from selva.utils.settings import values_of
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)


def collect_requests(config: InferenceConfig) -> dict[str, SoundRequest]:
    """Return the requests of all sounds, by the name of the output.

    Raises:
        UsageError: the inputs cannot be used, or one name is given for several of them.
    """
    requests = _requests_by_source(config)
    if config.name is None:
        return requests
    if len(requests) > 1:
        raise UsageError(f"--name {config.name}: is one name, but there are {counted(len(requests), 'clip')}")
    return dict(zip([config.name], requests.values(), strict=True))


def _requests_by_source(config: InferenceConfig) -> dict[str, SoundRequest]:
    """Return the requests, by names that follow from their sources."""
    if config.negative_prompt and config.sampling.cfg_strength < 1:
        log.warning("--negative_prompt %r has no effect: it works through the guidance, and there is none below "
                    "--cfg_strength 1 (it is %g)", config.negative_prompt, config.sampling.cfg_strength)
    if config.features:
        return feature_requests(config)
    if not config.videos:
        request = SoundRequest(None, None, config.prompt, config.negative_prompt, duration_sec=config.duration)
        return {name_of_words(config.prompt): request}
    try:
        jobs = collect_jobs(
            config.videos, recursive=config.recursive, prompt=config.prompt or "", prompts=config.prompts,
            start_sec=config.start, mask=config.masks.mask,
            duration_sec=config.duration or (WHOLE_VIDEO_SEC if config.long else DEFAULT_DURATION_SEC),
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    jobs = _without_outputs(config, jobs)
    warn_of_lengths(config, jobs)
    # Words typed for a video that was named itself are meant; a folder's or a table's own prompts go first.
    named = {path for path in config.videos if path.is_file()}
    prompts = {job.id: config.prompt if config.prompt and job.path in named else job.prompt for job in jobs}
    if without := [id_ for id_, prompt in prompts.items() if not prompt]:
        log.warning("no prompt for %s: the model is not told what is to be heard", listed(without))
    return {
        job.id: SoundRequest(job.path, None, prompts[job.id], config.negative_prompt, job.start_sec, job.duration_sec,
                             config.masks.of_clip(job.mask))
        for job in jobs
    }


def _without_outputs(config: InferenceConfig, jobs: list[ClipJob]) -> list[ClipJob]:
    """Return the clips without what earlier calls have made, where ``--recursive`` searches the output folder too."""
    output = real_path(config.output)
    if not config.recursive or not any(real_path(path) in output.parents for path in config.videos if path.is_dir()):
        return jobs
    kept = [job for job in jobs if job.path in config.videos or output not in real_path(job.path).parents]
    if not kept:
        raise UsageError(f"{listed([str(path) for path in config.videos])}: all videos are in the output folder "
                         f"{config.output}; name another --output, or give other videos")
    if len(kept) < len(jobs):
        log.info("%s in %s not taken, as the sounds of this call go there: %s", counted(len(jobs) - len(kept), "video"),
                 config.output, listed([job.id for job in jobs if job not in kept]))
    return kept


def name_of_words(prompt: str | None) -> str:
    """Return a file name for the sound of words alone."""
    return re.sub(r"\W+", "_", prompt or "").strip("_")[:60] or "sound"


def feature_requests(config: InferenceConfig) -> dict[str, SoundRequest]:
    """Return the requests for feature files, by the name of the output."""
    requests: dict[str, SoundRequest] = {}
    for path in config.features:
        found = sorted(p for p in path.glob("*.npz") if not p.name.startswith(".")) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"{path}: no .npz in this folder")
        for file in found:
            if file.stem in requests:
                raise UsageError(f"{requests[file.stem].features} and {file} would both become {file.stem}.flac")
            requests[file.stem] = SoundRequest(None, file, config.prompt, config.negative_prompt,
                                               duration_sec=config.duration)
    return requests


def warn_of_lengths(config: InferenceConfig, jobs: Sequence[ClipJob]) -> None:
    """Log warnings that name videos shorter than what was asked for, and those of which only the beginning gets sound.

    The second only where nobody asked for a length.
    """
    asked = config.duration
    if asked is not None and asked > DEFAULT_DURATION_SEC and not config.long:
        log.info("%g s are generated in one pass, but the models were trained on %g s; --long works in windows of that "
                 "length", asked, DEFAULT_DURATION_SEC)
    lengths, longer = [], []
    for job in jobs:
        is_asked = asked is not None or job.duration_sec not in (DEFAULT_DURATION_SEC, WHOLE_VIDEO_SEC)  # by a table
        if config.long and not is_asked:
            continue
        try:
            seconds = video_length(job.path) - job.start_sec
        except (ValueError, OSError):
            continue  # it will fail by name
        if is_asked and seconds > 0:  # else it will fail
            lengths.append((job.id, job.duration_sec, seconds))
        elif seconds > DEFAULT_DURATION_SEC + 0.5:
            longer.append(f"{job.path.name} ({seconds:.1f} s)")
    warn_of_shorter(lengths)
    if longer:
        log.warning("only the first %g s get sound in %s; --long makes it for the whole length",
                    DEFAULT_DURATION_SEC, listed(longer))


def adapter_setups(config: InferenceConfig) -> list[AdapterSetup]:
    """Return the adapters and strengths to use: one setup, or those of the list to compare."""
    variant = get_variant(config.model.variant)
    if config.compare:
        lines = read_compare_list(config.compare)
        return [
            AdapterSetup(line.label, load_adapters(line.adapters, variant, line.layers), line.adapters, line.times,
                         line.layers)
            for line in lines
        ]
    strengths = config.strength + [1.0] * (len(config.adapter) - len(config.strength))
    specs = tuple(zip(config.adapter, strengths, strict=True))
    for path, strength in specs:
        log.info("adapter %s at strength %g", path, strength)
    adapters = load_adapters(specs, variant, config.layers)
    if config.layers:
        log.info("the adapters act in %s", ", ".join(f"{counted(len(adapter.layer_names()), 'layer')} of {path}"
                                                     for (path, _), (adapter, _) in zip(specs, adapters, strict=True)))
    if config.times != WHOLE_INTERVAL:
        log.info("the adapters act from %g to %g on the way from noise (0) to sound (1)", *config.times)
    return [AdapterSetup("", adapters, specs, config.times, tuple(config.layers))]


def plan_clip(
    config: InferenceConfig, name: str, request: SoundRequest, setups: Sequence[AdapterSetup]
) -> BatchClip:
    """Return a clip with one variation for every setup and seed."""
    variations = []
    for index, setup in enumerate(setups):
        output = config.output / setup.label if config.compare else config.output
        for number in range(1, config.num_variations + 1):
            seed = config.seed + number - 1
            files = sound_files(output, name, request.video is not None, config.audio_only,
                                number if config.num_variations > 1 else None)
            # Without a name, the settings would name the sound after its source, and know no number.
            target, own_name = (files.written[0], None) if config.output_is_file else (output, files.stem)
            if own_name in (Path(request.source).stem, name_of_words(request.prompt)):
                own_name = None
            settings = variation_settings(config, request, setup, seed, target) | {"name": own_name}
            variations.append(Variation(index, seed, files, settings))
    return BatchClip(name, request, variations)


def variation_settings(
    config: InferenceConfig, request: SoundRequest, setup: AdapterSetup, seed: int, output: Path
) -> dict[str, Any]:
    """Return the settings, by the names of the flags, that make this one sound again."""
    own: dict[str, Any] = {
        "inputs": [], "video": [request.video] if request.video else [], "prompts": None, "recursive": False,
        "features": [request.features] if request.features else [], "prompt": request.prompt, "seed": seed,
        "start": request.start_sec, "mask": request.mask.path if request.mask else None,
        "duration": None if request.duration_sec == WHOLE_VIDEO_SEC else request.duration_sec,
        "adapter": [path for path, _ in setup.specs], "strength": [strength for _, strength in setup.specs],
        "times": list(setup.times), "layers": list(setup.layers) or None,
        "compare": None, "reference": None, "overwrite": False, "num_variations": 1, "output": output,
    }
    return values_of(config) | own


def check_names(config: InferenceConfig, clips: Sequence[BatchClip]) -> None:
    """Raise a UsageError if two sounds would be written to one file, or one over somebody else's."""
    if config.output_is_file and len(clips) > 1:
        raise UsageError(f"--output {config.output}: is one file, but there are {counted(len(clips), 'clip')}; name a "
                         "folder")
    files = [variation.files for clip in clips for variation in clip.variations]
    if problem := name_problem(files):
        raise UsageError(f"{problem}; rename the clip, or name one file with --output")
    if shared := shared_names(files):
        raise UsageError(f"{shared[0]} would be written twice; rename one of the clips, or another --output")
    check_targets(config, clips)
    if config.overwrite:
        return
    foreign = [str(path) for one in files for path in one.foreign() if path != config.output]  # that very file is meant
    if foreign:
        raise UsageError(f"{listed(foreign)}: there already, and not made by infer.py (no .yaml of it beside it); name "
                         "another --output, or replace it with --overwrite")


def check_targets(config: InferenceConfig, clips: Sequence[BatchClip]) -> None:
    """Raise a UsageError if a sound or a video would replace what is read, or the sound that features are trained with.

    Or if its settings would replace a ``.yaml`` of the user, such as that of ``--config``. Not even ``--overwrite`` can
    mean that: the next clip, or the next run, needs it.
    """
    inputs = {key: path for path in files_read(config, clips) if (key := _file_key(path)) is not None}
    replaced, trained = [], []
    for target in (path for clip in clips for variation in clip.variations for path in variation.files.written):
        source, features = inputs.get(_file_key(target) or (0, 0)), target.with_name(f"{target.stem}.npz")
        if source is not None:
            replaced.append(str(target))
        elif target.suffix.lower() in AUDIO_SUFFIXES and features.is_file():
            trained.append(f"{target} (of {features.name})")
    problems = []
    if replaced:
        problems.append(f"{listed(replaced)}: would be replaced, but is itself an input of this run; name another "
                        "--output, or leave videos out with --audio_only")
    if trained:
        problems.append(f"{listed(trained)}: lies beside features of its name, so training would take it for their "
                        "sound; name another --output")
    every = (variation.files for clip in clips for variation in clip.variations)
    if taken := [str(files.settings) for files in every if files.settings_are_foreign()]:
        problems.append(f"{listed(taken)}: not written by infer.py, but the settings of the sound would replace it; "
                        "name another --output, or move it")
    if problems:
        raise UsageError("; ".join(problems))


def files_read(config: InferenceConfig, clips: Sequence[BatchClip]) -> Iterator[Path]:
    """Yield every file that a call reads."""
    yield from (path for path in (*config.videos, *config.features, *config.adapter) if path.is_file())
    yield from (path for path in (config.prompts, config.compare, config.masks.mask) if path is not None)
    for clip in clips:
        request = clip.request
        yield from (path for path in (request.video, request.features) if isinstance(path, Path))
        if request.mask is not None:
            yield request.mask.path
        yield from (path for variation in clip.variations for path in _adapters_of(variation))
    if config.reference is not None:
        yield from (path for path in config.reference.glob("*") if path.is_file())


def _adapters_of(variation: Variation) -> list[Path]:
    return [Path(path) for path in variation.settings.get("adapter") or []]


def _file_key(path: Path) -> tuple[int, int] | None:
    """Return the identity that two names of one file share, links and spellings included; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
