"""Page about a run: what it was, whether it worked, how that sounds, the curves, and what is needed to repeat it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from selva.evaluation.page_sound import page_sound
from selva.media import read_audio
from selva.training.config import RunConfig
from selva.training.memorisation import spread
from selva.training.model_card import use_command
from selva.training.run import TrainingRun
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
    seconds = sum(metrics.series("sec_per_step")[1])
    trained = counted(run.step, "step") + (f" in {clock(seconds)}" if seconds else "")
    page = Page(listed(prompts, 2) if prompts else adapter.parent.name,
                f"{config.model.variant}, rank {config.lora.rank}, {trained}")
    page.cards(_cards(run, metrics, verdict, adapter))
    if verdict is not None:
        page.section("Verdict", f"{verdict.line().removeprefix('verdict: ')}. Rules of thumb: the sounds below decide.")
        _sounds(page, verdict)
    _samples(page, metrics, adapter.parent)
    _curves(page, metrics)
    page.section("Use it")
    page.code(use_command(str(adapter), config.model.variant, prompts[0] if prompts else ""))
    if data:
        page.section("Data")
        page.code("\n".join(data))
    page.section("Settings", "config.yaml in the folder of the run, which --config reads back.")
    page.code(settings.strip())
    page.section("Environment")
    page.table(("", ""), _environment(run))
    return page


def _cards(
    run: TrainingRun, metrics: MetricsFile, verdict: Verdict | None, adapter: Path
) -> list[tuple[str, str, str]]:
    cards = []
    if verdict is not None:
        f = verdict.figures
        cards.append(("verdict", verdict.word, verdict.advice and f"try {verdict.advice}"))
        if f.nearer_db is not None and f.moved_db is not None:
            cards.append(("nearer to the recordings", f"{f.nearer_db:+.1f} dB", f"moved by {f.moved_db:.1f} dB in all"))
        if f.foreign_moved_db is not None:
            drawn = "" if f.foreign_drawn is None else f"; {max(0.0, 100 * f.foreign_drawn):.0f} % of the way to yours"
            cards.append(("foreign prompts moved", f"{f.foreign_moved_db:.1f} dB", f"less is better{drawn}"))
    _, losses = metrics.series("val_loss")
    if losses:
        cards.append(("held-out loss", f"{losses[0]:.3f} → {losses[-1]:.3f}",
                      f"best {run.best_val_loss:.3f} at step {run.best_step}"))
    cards.append(("adapter", f"{adapter.stat().st_size / 2**20:.1f} MB", adapter.name))
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


def _samples(page: Page, metrics: MetricsFile, folder: Path) -> None:
    """Add the samples of some checkpoints, first and last among them."""
    files = sorted(folder.glob("sample_step*.wav"))
    if not files:
        return
    page.section("While training", "The same clip at some of the checkpoints, always from the same noise.")
    sounds = []
    for number in spread(len(files), MOST_SAMPLES):
        waveform, rate = read_audio(files[number])
        step = int(files[number].stem.removeprefix("sample_step"))
        sounds.append(page_sound(f"step {step}", files[number].name, waveform.mean(dim=0), rate))
    page.sounds("samples", sounds)


def _curves(page: Page, metrics: MetricsFile) -> None:
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
                     "noise and times. Where the curves part, clips are learned by heart. The fall alone tells "
                     f"training clips from held-out ones with an area under the curve of {auc[-1]:.2f} (0.5: not at "
                     "all, 1: always).")
        page.image(curves_png([(label, steps, [100 * v for v in values]) for label, steps, values in drops],
                              "fall of the loss, %"), "fall of the loss of training and held-out clips")


def _environment(run: TrainingRun) -> list[tuple[str, str]]:
    device = run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return [
        ("SelVA LoRA", __version__), ("Python", platform.python_version()), ("PyTorch", torch.__version__),
        ("system", platform.platform()), ("device", f"{name}, {counted(torch.get_num_threads(), 'thread')} on the CPU"),
        ("processes", str(run.world.size)), ("precision", str(run.precision).removeprefix("torch.")),
        ("peak memory", f"{peak_memory_bytes(device) / 2**30:.2f} GiB"),
    ]
