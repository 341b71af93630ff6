"""Page about a run: what it was, whether it worked, how that sounds, the curves, and what is needed to repeat it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from selva.evaluation.page_sound import page_file, page_sound
from selva.training.config import RunConfig
from selva.training.memorisation import spread
from selva.training.model_card import use_command
from selva.training.run import TrainingRun
from selva.training.run_folder import BEST
from selva.training.verdict import HeardClip, Verdict
from selva.utils.device import peak_memory_bytes
from selva.utils.html_report import Page, curves_png, loss_png
from selva.utils.metrics_log import MetricsFile
from selva.utils.text import clock, counted, listed
from selva.utils.version import __version__

PAGE_FILE = "report.html"
MOST_SAMPLES = 3  # of those made while training


def run_page(
    run: TrainingRun, config: RunConfig, metrics: MetricsFile, verdict: Verdict | None, prompts: list[str],
    adapter: Path, data: list[str], settings: str,
) -> Page:
    """Return the page of a finished run.

    Args:
        prompts: of the training clips. adapter: the final one. data: lines of the data summary. settings: YAML.
    """
    page = Page(listed(prompts, 2) if prompts else adapter.parent.name,
                f"{config.model.variant}, rank {config.lora.rank}, {trained(run.step, metrics)}",
                page_mark(adapter.name, run.step))
    page.cards([*(verdict_cards(verdict.to_json()) if verdict is not None else []), *run_cards(metrics, adapter)])
    if verdict is not None:
        page.section("Verdict", f"{verdict.line().removeprefix('verdict: ')}. Rules of thumb: the sounds below decide.")
        _sounds(page, verdict)
    add_samples(page, adapter.parent)
    add_curves(page, metrics)
    chosen, why = adapter_to_use(run, adapter)
    add_use(page, chosen, config.model.variant, prompts[0] if prompts else "", why)
    if data:
        page.section("Data")
        page.code("\n".join(data))
    add_settings(page, settings)
    page.section("Environment")
    page.table(("", ""), _environment(run))
    return page


# -- parts of the page of a run, which pages about a run in another folder need too -----------------------------------


def page_mark(adapter: str, step: int) -> str:
    """Return the words in the head of a page that say which adapter, by the name of its file, it is about."""
    return f"{adapter}, step {step}"


def trained(steps: int, metrics: MetricsFile) -> str:
    """Return the length of a training in words, with its time if the metrics have it."""
    seconds = sum(metrics.series("sec_per_step")[1])
    return counted(steps, "step") + (f" in {clock(seconds)}" if seconds else "")


def verdict_cards(verdict: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the cards of a verdict as ``verdict.json`` holds it."""
    cards = [("verdict", str(verdict["verdict"]), verdict["advice"] and f"try {verdict['advice']}")]
    if verdict["nearer_db"] is not None and verdict["moved_db"] is not None:
        cards.append(("nearer to the recordings", f"{verdict['nearer_db']:+.1f} dB",
                      f"moved by {verdict['moved_db']:.1f} dB in all"))
    if verdict["foreign_moved_db"] is not None:
        drawn = verdict.get("foreign_drawn")  # files of an earlier version have none
        away = "" if drawn is None else f"; {max(0.0, 100 * drawn):.0f} % of the way to yours"
        cards.append(("foreign prompts moved", f"{verdict['foreign_moved_db']:.1f} dB", f"less is better{away}"))
    return cards


def run_cards(metrics: MetricsFile, adapter: Path) -> list[tuple[str, str, str]]:
    """Return the cards of the losses and the adapter of a run."""
    steps, losses = metrics.series("val_loss")
    cards = []
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        cards.append(("held-out loss", f"{losses[0]:.3f} → {losses[-1]:.3f}",
                      f"best {losses[best]:.3f} at step {steps[best]}"))
    if adapter.is_file():
        size = adapter.stat().st_size
        cards.append(("adapter", f"{size / 2**20:.1f} MB" if size >= 1e5 else f"{size / 2**10:.0f} kB", adapter.name))
    return cards


def _sounds(page: Page, verdict: Verdict) -> None:
    held_out = verdict.figures.held_out
    page.section("Listen", f"{'Held-out' if held_out else 'Training'} clips, without and with the adapter, from the "
                 "same noise.")
    for heard in verdict.clips:
        _heard(page, heard)
    page.section("Other sounds", "Prompts that were not trained on, without a video. They should sound as before.")
    for heard in verdict.foreign:
        _heard(page, heard)


def _heard(page: Page, heard: HeardClip) -> None:
    sounds = [page_sound("before", "the base model", heard.before, heard.rate),
              page_sound("after", "with the adapter", heard.after, heard.rate)]
    if heard.recorded is not None:
        sounds.append(page_sound("recorded", "", heard.recorded, heard.rate))
    page.sounds(heard.name if heard.name == heard.prompt else f"{heard.name}: {heard.prompt}", sounds)


def add_samples(page: Page, folder: Path) -> None:
    """Add the samples of some checkpoints, first and last among them."""
    files = sorted(folder.glob("sample_step*.wav"))
    if not files:
        return
    page.section("While training", "The same clip at some of the checkpoints, always from the same noise.")
    sounds = []
    for number in spread(len(files), MOST_SAMPLES):
        step = int(files[number].stem.removeprefix("sample_step"))
        sounds.append(page_file(f"step {step}", files[number].name, files[number]))
    page.sounds("samples", sounds)


def add_curves(page: Page, metrics: MetricsFile) -> None:
    """Add the curves of a run: losses, held-out losses by noise level, what is learned by heart; those there are."""
    picture = loss_png(metrics)
    if picture is not None:
        page.section("Training", "How well the flow is predicted; lower is better.")
        page.image(picture, "training and validation loss")
    rows = [row for row in metrics.rows if row.get("val_loss_bins")]
    if rows:
        steps, number = [row["step"] for row in rows], len(rows[0]["val_loss_bins"])
        page.section("Held-out loss by noise level", "From noise (0) to sound (1). One that rises while the mean falls "
                     "means that this part gets worse.")
        page.image(curves_png([
            (f"times {i / number:g} to {(i + 1) / number:g}", steps,
             [float("nan") if row["val_loss_bins"][i] is None else row["val_loss_bins"][i] for row in rows])
            for i in range(number)
        ], "loss"), "held-out loss in four bins of time")
    drops = [(label, *metrics.series(key)) for key, label in (("train_drop", "training clips"),
                                                              ("val_drop", "held-out clips"))]
    if drops[0][1]:
        _, auc = metrics.series("member_auc")
        page.section("Learned, or learned by heart", "By how much the loss fell below the base model's, at the same "
                     "noise and times. Where the curves part, clips are learned by heart. How well the fall "
                     f"tells training clips from held-out ones (area under the ROC curve): {auc[-1]:.2f}; 0.5 is "
                     "chance, 1 tells them all apart.")
        page.image(curves_png([(label, steps, [100 * v for v in values]) for label, steps, values in drops],
                              "fall of the loss, %"), "fall of the loss of training and held-out clips")


def adapter_to_use(run: TrainingRun, final: Path) -> tuple[Path, str]:
    """Return the adapter of a finished run to begin with, the best one if there is one, and the reason."""
    best = final.with_name(f"{BEST}{final.suffix}")
    if not len(run.val_clips):
        return final, f"No clips were held out, so no step is known to be the best: {final.name} is the last one."
    if not 0 < run.best_step <= run.step or not best.is_file():
        return final, (f"The loss of the held-out clips never fell below that of the base model: {final.name} is the "
                       "last step. Listen before you use it.")
    if run.best_step == run.step:
        return best, (f"The loss of the held-out clips was lowest at the last step, so {best.name} and {final.name} "
                      "are the same.")
    return best, (f"{best.name} is step {run.best_step}, where the loss of the held-out clips was lowest. {final.name} "
                  f"is the last step, {run.step}, and a verdict on this page is about that one. Try both.")


def add_use(page: Page, adapter: Path, variant: str, prompt: str, why: str = "") -> None:
    """Add the command that makes sound with the adapter, and ``why`` it is this one."""
    page.section("Use it", why)
    page.code(use_command(str(adapter), variant, prompt))


def add_settings(page: Page, settings: str) -> None:
    """Add the settings of a run, YAML."""
    page.section("Settings", "config.yaml in the folder of the run, which --config reads back.")
    page.code(settings.strip())


def _environment(run: TrainingRun) -> list[tuple[str, str]]:
    device = run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return [
        ("SelVA LoRA", __version__), ("Python", platform.python_version()), ("PyTorch", torch.__version__),
        ("system", platform.platform()), ("device", f"{name}, {counted(torch.get_num_threads(), 'thread')} on the CPU"),
        ("processes", str(run.world.size)), ("precision", str(run.precision).removeprefix("torch.")),
        ("peak memory", f"{peak_memory_bytes(device) / 2**30:.2f} GiB"),
    ]
