"""Write one HTML page about what a training run has changed: new videos with the sound before and after.

    python infer.py new/ --variant small_16k --selva_dir weights --prompt "a dog barking" --output before
    python infer.py new/ --variant small_16k --selva_dir weights --prompt "a dog barking" --output after \\
        --adapter runs/dog/adapter_final.pt
    python scripts/make_report.py --run runs/dog --before before --after after --output report.html

Clips of one name in both folders are shown side by side; --true adds the videos with the sound that they really have.
Where that folder holds an events.tsv of make_demo_clips.py, the page also says how well the onsets fit what happens
(XX"""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.extraction.manifest import MANIFEST_FILE
from selva.media import prepare_audio, read_audio
from selva.training.outcome import VERDICT_FILE
from selva.training.report import add_curves, add_settings, add_use, run_cards, trained, verdict_cards
from selva.training.set_aside import step_in_adapter
from selva.utils.errors import UserError
from selva.utils.files import check_own_output, json_lines
from selva.utils.html_report import Page, ReportSound, is_page
from selva.utils.metrics_log import MetricsFile
from selva.utils.progress import Progress
from selva.utils.text import counted
from selva.utils.yaml_file import read_yaml
from toyworld.judging import RATE, Classifier, fit_classifier, timing

log = logging.getLogger("selva.make_report")

MEDIA_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".flac", ".wav")  # the first that is there is played
LABELS = {"before": "before", "after": "with the adapter", "true": "true sound"}
ABOUT = "sounds before and after a training, by make_report.py"  # in the head of a page, which may be replaced by it
QUICKSTART = "tiny_16k learns a new sound: "  # title of its page
FIT_COUNT = 25  # scenes per class for the classifier


@dataclass
class Judged:
    """Scores of the sounds of one kind: "before", "after" or "true"."""

    f1: list[float] = field(default_factory=list)
    heard_as: list[str] = field(default_factory=list)


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("report")
    group.add_argument("--run", type=Path, required=True, help="output folder of train_lora.py")
    group.add_argument("--before", type=Path, required=True, help="output folder of infer.py without the adapter")
    group.add_argument("--after", type=Path, required=True, help="the same with it")
    group.add_argument("--true", type=Path, help="folder of the videos with their true sound")
    group.add_argument("--title", default="A new sound", help="of the page")
    group.add_argument("--commands", type=Path, metavar="FILE", help="text to show as what was run")
    group.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    parser.add_common(seed=False, device=False)
    return parser


def media_of(folder: Path | None, stem: str) -> Path | None:
    """Return the file of that stem that a page can play, a video rather than a sound."""
    if folder is None:
        return None
    return next((path for s in MEDIA_SUFFIXES if (path := folder / f"{stem}{s}").is_file()), None)


def clip_names(before: Path, after: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the stems that both folders have something to play of, and (stem, reason) of those left out."""
    for folder in (before, after):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; it is the --output of infer.py")
    stems = {folder: {path.stem for path in folder.iterdir() if path.suffix.lower() in MEDIA_SUFFIXES}
             for folder in (before, after)}
    if not (shared := sorted(stem for stem in stems[after] if media_of(before, stem) and media_of(after, stem))):
        raise UserError(f"{before} and {after} have no clip of the same name; use the same videos for both")
    left_out = []
    for folder, other in ((before, after), (after, before)):
        failed = {row.get("id"): row.get("reason") for row in json_lines(folder / MANIFEST_FILE)}
        left_out += [(stem, f"not in {folder}" + (f": {failed[stem]}" if failed.get(stem) else ""))
                     for stem in sorted(stems[other].difference(shared))]
    for stem, reason in left_out:
        log.warning("%s: left out, %s", stem, reason)
    return shared, left_out


def read_events(folder: Path | None) -> dict[str, tuple[str, list[float]]]:
    """Return {clip: (sound, times in seconds)} from the events.tsv of a folder, empty if it has none.

    Of a clip with two objects, the one counts that the file is named after.
    """
    path = folder / "events.tsv" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    times: dict[str, tuple[str, list[float]]] = defaultdict(lambda: ("", []))
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                clip, sound, time = row["id"], row["sound"], float(row["time_sec"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: not an events.tsv of make_demo_clips.py ({error})") from error
            if clip.startswith(f"{sound}_"):
                times[clip] = (sound, [*times[clip][1], time])
    return dict(times)


def prompt_of(folder: Path, name: str) -> str:
    """Return the prompt of a sound, which `infer.py` noted beside it; "" if it did not."""
    path = folder / f"{name}.yaml"
    try:
        noted = read_yaml(path) if path.is_file() else None
    except UserError as error:
        log.warning("%s; its prompt is left out", error)
        return ""
    return str(noted.get("prompt") or "") if isinstance(noted, dict) else ""


def mono(path: Path) -> tuple[np.ndarray, int]:
    """Return (samples,) and the rate of the sound of a file, as it is."""
    waveform, rate = read_audio(path)
    return waveform.mean(dim=0).numpy(), rate


def judge(
    waveform: np.ndarray, rate: int, truth: tuple[str, list[float]], classifier: Classifier, into: Judged
) -> str:
    """Return one line on how well a sound fits what is seen."""
    if np.abs(waveform).max() < 1e-4:
        heard, f1 = "silence", 0.0
    else:
        sound = prepare_audio(torch.from_numpy(waveform), rate, RATE).numpy()
        heard, f1 = classifier.classify(sound), timing(sound, truth[1]).f1
    into.f1.append(f1)
    into.heard_as.append(heard)
    return f"heard as: {heard}; onset F1 {f1:.2f}"


def run_facts(run: Path) -> tuple[dict, MetricsFile, Path, dict | None]:
    """Return meta.json, the metrics, the final adapter (which may be gone) and the verdict of a training run.

    Raises:
        FileNotFoundError: it is not the folder of a finished run.
        UserError: its meta.json or its verdict.json is damaged.
    """
    if not (run / "meta.json").is_file():
        raise FileNotFoundError(f"{run}/meta.json: no such file; --run is the --output_dir of train_lora.py")
    meta, verdict = read_json(run / "meta.json"), None
    finals = [path for path in sorted(run.glob("adapter_final*.*")) if step_in_adapter(path) == meta.get("step")]
    if (run / VERDICT_FILE).is_file():
        verdict = read_json(run / VERDICT_FILE)
        if (step := verdict.get("step")) != meta.get("step"):
            log.warning("%s: is of step %s, the run of step %s; left out", run / VERDICT_FILE, step, meta.get("step"))
            verdict = None
    return meta, MetricsFile(run / "metrics.jsonl"), finals[-1] if finals else run / "adapter_final.pt", verdict


def read_json(path: Path) -> dict:
    """Return the object in a file of a run.

    Raises:
        UserError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def summary(judged: dict[str, Judged], truths: dict[str, tuple[str, list[float]]]) -> list[tuple[str, str, str]]:
    """Return the cards that say what changed; empty where nothing is known about the truth."""
    if not truths:
        return []
    names = sorted({sound for sound, _ in truths.values()})
    wanted = " or ".join(names)
    counts = {kind: sum(heard in names for heard in row.heard_as) for kind, row in judged.items()}
    f1 = {kind: float(np.mean(row.f1)) for kind, row in judged.items() if row.f1}
    total = len(judged["after"].heard_as)
    beside = f"; true sound {f1['true']:.2f}" if "true" in f1 else ""
    return [
        (f"recognised as {wanted}", f"{counts['before']} of {total} → {counts['after']} of {total}",
         "before → with the adapter"),
        ("onset F1 within 80 ms", f"{f1['before']:.2f} → {f1['after']:.2f}", f"before → with the adapter{beside}"),
    ]


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_own_output("--output", args.output, ".html", lambda path: is_page(path, ABOUT, QUICKSTART))
    meta, metrics, adapter, verdict = run_facts(args.run)
    names, left_out = clip_names(args.before, args.after)
    truths = {name: truth for name, truth in read_events(args.true).items() if name in names}
    classifier = fit_classifier(FIT_COUNT) if truths else None
    judged: dict[str, Judged] = defaultdict(Judged)
    rows: list[tuple[str, list[ReportSound], list[float]]] = []
    with Progress(len(names), "looking at clips", "clips") as progress:
        for number, name in enumerate(names, 1):
            sounds, truth = [], truths.get(name)
            for kind, folder in (("before", args.before), ("after", args.after), ("true", args.true)):
                if (media := media_of(folder, name)) is None:
                    continue
                waveform, rate = mono(media)
                note = judge(waveform, rate, truth, classifier, judged[kind]) if truth and classifier else ""
                sounds.append(ReportSound(LABELS[kind], note, media, waveform, rate))
            rows.append((name, sounds, truth[1] if truth else []))
            progress.update(number)

    steps, variant = metrics.series("loss")[0], str(meta.get("variant", "a model"))
    done = trained(steps[-1] if steps else 0, metrics)
    page = Page(args.title, f"{variant}, rank {meta.get('rank', '?')}, {done}", ABOUT)
    cards = summary(judged, truths)
    page.cards([*cards, *(verdict_cards(verdict) if verdict else []), *run_cards(metrics, adapter)])
    page.section("Listen", "New videos that the adapter was not trained on. "
                 + ("The green marks are the moments at which something happens in the picture." if truths else ""))
    for name, sounds, event_times in rows:
        page.sounds(name, sounds, event_times)
    if left_out:
        page.section("Left out", f"Of one folder only; {counted(len(names), 'clip is', 'clips are')} compared.")
        page.table(("clip", "reason"), left_out)
    add_curves(page, metrics)
    if adapter.is_file():
        add_use(page, adapter, variant, prompt_of(args.after, names[0]))
    if (args.run / "config.yaml").is_file():
        add_settings(page, (args.run / "config.yaml").read_text(encoding="utf-8"))
    if args.commands is not None:
        page.section("How this was made")
        page.code(args.commands.read_text(encoding="utf-8").strip())
    page.write(args.output)
    for what, value, note in cards:
        log.info("%s: %s (%s)", what, value, note)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
