"""An evaluation as a table on the terminal, JSON, CSV and one HTML page."""

from __future__ import annotations

import csv
import io
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from selva.evaluation.intervals import Figure
from selva.evaluation.page_sound import page_file
from selva.evaluation.run import PAIRED, Evaluation
from selva.utils.files import atomic_write_text, next_aside, real_path
from selva.utils.html_report import Page

log = logging.getLogger(__name__)

JSON_FILE, CSV_FILE, PAGE_FILE = "evaluation.json", "evaluation.csv", "evaluation.html"
PLAYERS = 8  # pairs with players on the page: those with the largest distance, and as many with the smallest


@dataclass(frozen=True)
class Row:
    """Presentation of a figure: name, number format, unit, which direction is good, and one line about it."""

    name: str
    number: str
    unit: str
    better: str
    about: str


ROWS = {
    "log_spectral_distance_db": Row("LSD", ".2f", "dB", "lower", "log-spectral distance to the recording"),
    "mel_cepstral_distortion_db": Row("MCD", ".2f", "dB", "lower", "mel-cepstral distortion: difference of timbre"),
    "stft_distance": Row("STFT", ".3f", "", "lower", "multi-resolution STFT distance"),
    "onset_f1": Row("onset F1", ".3f", "", "higher", "events at the same moments as in the recording, within 80 ms"),
    "onset_offset_sec": Row("onset offset", ".3f", "s", "lower", "distance of the events that match"),
    "loudness_difference_lu": Row("loudness", ".2f", "LU", "lower", "difference of the loudness"),
    "centroid_difference_oct": Row("brightness", ".2f", "octaves", "lower", "difference of the spectral centroid"),
    "silent_share_difference": Row("silence", ".3f", "", "lower", "difference of the silent share"),
    "desync_sec": Row("DeSync", ".3f", "s", "lower", "distance of sound and picture, as Synchformer hears it"),
    "clap_score": Row("CLAP", ".3f", "", "higher", "cosine of the sound with its caption"),
    "ast_kl": Row("KL", ".3f", "", "lower", "divergence of the classes heard in recording and generated sound"),
    "clap_fd": Row("FD (CLAP)", ".2f", "", "lower", "Fréchet distance of the two sets of sounds"),
    "clap_kd": Row("KD (CLAP)", ".3f", "", "lower", "kernel distance of the two sets, unbiased: about 0 is equal"),
    "ast_fd": Row("FD (AST)", ".2f", "", "lower", "Fréchet distance of the two sets of sounds"),
    "ast_kd": Row("KD (AST)", ".3f", "", "lower", "kernel distance of the two sets, unbiased: about 0 is equal"),
    "ast_is": Row("IS (AST)", ".2f", "", "higher", "inception score: sure of each sound, and many kinds of sound"),
}


def cells(key: str, figure: Figure) -> tuple[str, str, str, str]:
    """Return (name with unit, value, interval, number of items) as text."""
    row = ROWS[key]
    name = f"{row.name} ({row.unit})" if row.unit else row.name
    interval = ""
    if figure.low is not None and figure.high is not None:
        interval = f"{figure.low:{row.number}} to {figure.high:{row.number}}"
    return name, f"{figure.value:{row.number}}", interval, str(figure.items)


def table(evaluation: Evaluation) -> list[str]:
    """Return the figures as lines of at most 100 columns."""
    lines = [f"{'':24}{'value':>10}  {'95 % interval':<22}{'items':>6}  better"]
    for key in ROWS:
        if key in evaluation.figures:
            name, value, interval, items = cells(key, evaluation.figures[key])
            lines.append(f"{name:24}{value:>10}  {interval:<22}{items:>6}  {ROWS[key].better}")
    return lines


def to_json(evaluation: Evaluation) -> str:
    """Return everything as JSON: figures with intervals, the figures of every pair, what failed and what was odd."""
    content = {
        **_folders(evaluation),
        "figures": {key: asdict(figure) for key, figure in evaluation.figures.items()},
        "not_computed": evaluation.reasons,
        "remarks": evaluation.remarks,
        "failed": [{"name": name, "reason": reason} for name, reason in evaluation.failed],
        "pairs": [
            {"name": pair.name, "generated": str(pair.generated), "reference": str(pair.reference),
             "video": str(pair.video) if pair.video else None, "caption": pair.caption, **figures}
            for pair, figures in evaluation.pairs
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def to_csv(evaluation: Evaluation) -> str:
    """Return the figures of every pair, one row each; cells without a meaning are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [key for key in PAIRED if key in evaluation.figures]
    writer.writerow(["name", "generated", "reference", *keys])
    for pair, figures in evaluation.pairs:
        writer.writerow([pair.name, pair.generated, pair.reference, *(_plain(figures.get(key)) for key in keys)])
    return text.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _folders(evaluation: Evaluation) -> dict[str, str]:
    """Return the two folders that were compared, by which a later evaluation knows whose results it would replace."""
    return {"generated": str(real_path(evaluation.generated)), "reference": str(real_path(evaluation.reference))}


def write_outputs(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write JSON, CSV and the page into a folder, and return their paths.

    Those of the same two folders are replaced. Others, whatever they are, are moved to ``previous_001`` (002, ...).
    """
    paths = [folder / name for name in (PAGE_FILE, JSON_FILE, CSV_FILE)]
    _make_way(paths, _folders(evaluation))
    _page(evaluation).write(paths[0])
    atomic_write_text(paths[1], to_json(evaluation))
    atomic_write_text(paths[2], to_csv(evaluation))
    return paths


def _make_way(paths: list[Path], folders: dict[str, str]) -> None:
    """Say that earlier results are replaced, or move them aside if they are of other folders."""
    there = [path for path in paths if path.exists()]
    if not there:
        return
    try:
        noted = json.loads(paths[1].read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        noted = None
    before = {name: noted.get(name) for name in folders} if isinstance(noted, dict) else {}
    if before == folders:
        log.info("%s: the results of an earlier evaluation of these folders are replaced", paths[0].parent)
        return
    aside = next_aside(paths[0].parent)
    aside.mkdir()
    for path in there:
        path.rename(aside / path.name)
    what = " and ".join(str(name) for name in before.values() if name)
    log.warning("%s: held the results of %s; now in %s: %s", paths[0].parent, what or "something else", aside,
                ", ".join(path.name for path in there))


def _page(evaluation: Evaluation) -> Page:
    number = len(evaluation.pairs)
    page = Page("Evaluation", f"{number} pair{'' if number == 1 else 's'} of generated and recorded sounds")
    shown = [key for key in ("log_spectral_distance_db", "onset_f1", "desync_sec", "clap_score", "clap_kd", "ast_kl")
             if key in evaluation.figures][:4]
    cards = []
    for key in shown:
        _, value, interval, _ = cells(key, evaluation.figures[key])
        cards.append((ROWS[key].about, f"{value} {ROWS[key].unit}".strip(), interval))
    page.cards(cards)
    page.section("All figures", "The intervals hold the true mean in 95 of 100 cases; they come from drawing the pairs "
                 "again and again.")
    page.table(("figure", "value", "95 % interval", "items", "better", "what it is"), [
        (*cells(key, evaluation.figures[key]), ROWS[key].better, ROWS[key].about)
        for key in ROWS if key in evaluation.figures])
    remarks = [*evaluation.remarks, *(f"no {ROWS[key].name}: {reason}" for key, reason in evaluation.reasons.items()),
               *(f"{name} was left out: {reason}" for name, reason in evaluation.failed)]
    if remarks:
        page.section("To know")
        page.table(("",), [(remark,) for remark in remarks])
    ordered = sorted((pair for pair in evaluation.pairs if pair[1]["log_spectral_distance_db"] is not None),
                     key=lambda pair: pair[1]["log_spectral_distance_db"])
    if ordered:
        far, near = ordered[::-1][: PLAYERS // 2], ordered[: max(0, min(PLAYERS // 2, len(ordered) - PLAYERS // 2))]
        for heading, chosen in (("Furthest from their recordings", far), ("Nearest to their recordings", near)):
            if chosen:
                page.section(heading)
            for pair, figures in chosen:
                page.sounds(pair.name, [page_file("generated", _note(figures), pair.generated),
                                        page_file("recorded", pair.caption or "", pair.reference)])
    return page


def _note(figures: dict) -> str:
    return f"LSD {figures['log_spectral_distance_db']:.1f} dB, onset F1 {figures['onset_f1']:.2f}"
