"""An inspected data set as text: a table that fits 100 columns, a sentence for everything odd, and JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from selva.data.inspection.measures import ClipReport, Inspection
from selva.utils.text import clock, counted, listed

PNG_TITLE = "data set, by inspect_dataset.py"  # in the head of an overview
WIDTH = 100
ID_WIDTH = 20  # at least for long names
MOST_ROWS = 200  # of the table; those with something to say come first
NAMED = 5  # clips that a sentence names

Column = tuple[str, Callable[[ClipReport], str | None]]  # head, text of a cell


def _number(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _norm(report: ClipReport) -> str | None:
    if report.clip_norm is None:
        return None
    low, high = (f"{value:.2f}" for value in report.clip_norm)
    return low if low == high else f"{low}-{high}"


COLUMNS: tuple[Column, ...] = (
    ("sec", lambda r: _number(r.duration_sec, 2)),
    ("LUFS", lambda r: _number(r.sound.loudness_lufs) if r.sound else None),
    ("peak", lambda r: _number(r.sound.peak_db) if r.sound else None),
    ("dBTP", lambda r: _number(r.true_peak_db)),
    ("silent", lambda r: f"{100 * r.sound.silent_share:.0f} %" if r.sound else None),
    ("clipped", lambda r: str(r.sound.clipped_samples) if r.sound else None),
    ("latent", lambda r: _number(r.latent_rms, 2)),
    ("std", lambda r: _number(r.latent_std, 3)),
    ("norm", _norm),
)


def sign_of(report: ClipReport) -> str:
    """Return "!" for a clip that cannot be used, "?" for one with a note, else " "."""
    return "!" if report.problems else "?" if report.notes else " "


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def table(inspection: Inspection) -> list[str]:
    """Return a line per clip; of very many clips those with a sign first, and the number of those not shown."""
    clips = inspection.clips
    if len(clips) > MOST_ROWS:
        clips = sorted(clips, key=lambda clip: " ?!".index(sign_of(clip)), reverse=True)[:MOST_ROWS]
    if not clips:
        return []
    columns = [[head, *(cell(clip) or "-" for clip in clips)] for head, cell in COLUMNS if any(map(cell, clips))]
    columns = [[f"{text:>{max(map(len, column))}}" for text in column] for column in columns]
    cells = ["  ".join(row) for row in zip(*columns, strict=True)] if columns else [""] * (len(clips) + 1)
    id_width = max(4, *(len(clip.id) for clip in clips))
    # rather both names and prompts are cut a little than one is lost
    id_width = min(id_width, max(ID_WIDTH, WIDTH - len(cells[0]) - 6 - max(len(clip.prompt) for clip in clips)))
    prompt_width = max(1, WIDTH - len(cells[0]) - 6 - id_width)
    lines = [f"  {'clip':{id_width}}  {cells[0]}  prompt"]
    for clip, row in zip(clips, cells[1:], strict=True):
        line = f"{sign_of(clip)} {fit(clip.id, id_width):{id_width}}  {row}  {fit(clip.prompt, prompt_width)}"
        lines.append(line.rstrip())
    if len(clips) < len(inspection.clips):
        lines.append(f"... and {len(inspection.clips) - len(clips)} more; --json has all")
    return lines


def sentences(inspection: Inspection) -> list[str]:
    """Return all problems and oddities, the worst first; a sentence that many clips share names five."""
    lines = [f"! {path}: {reason}" for path, reason in inspection.left_out]
    for sign, reports in (
        ("!", [(clip.id, clip.problems) for clip in inspection.clips]),
        ("?", [(clip.id, clip.notes) for clip in inspection.clips]),
    ):
        shared: dict[str, list[str]] = defaultdict(list)
        for clip_id, texts in reports:
            for text in texts:
                shared[text].append(clip_id)
        lines += [f"{sign} {listed(ids, NAMED)}: {text}" for text, ids in shared.items()]
    for group in inspection.alike:
        how = "the same" if group.similarity > 0.9999 else f"nearly the same ({group.similarity:.3f})"
        lines.append(f"? {listed(group.ids, NAMED)}: {LIKENESS[group.what].format(how=how)}")
    if not inspection.compared:
        lines.append("? too many clips to compare every pair; only identical content was looked for")
    if inspection.undecided:
        lines.append(f"? {counted(inspection.undecided, 'more pair')} of sounds with the same loudness over time, too "
                     "many to compare each closely")
    return lines


LIKENESS = {
    "sound": "{how} sound; they count twice, or one of them has the sound of another",
    "latents": "{how} sound; they count twice",
    "video": "{how} video; validation on one of them says nothing about new videos",
}


def summary(inspection: Inspection) -> str:
    """Return one line about all of it."""
    kind = {"pairs": "pairs of features and sound", "sounds": "sounds without features", "memmap": "rows of a memmap"}
    bad = sum(bool(clip.problems) for clip in inspection.clips) + len(inspection.left_out)
    odd = sum(bool(clip.notes) and not clip.problems for clip in inspection.clips)
    seconds = sum(clip.duration_sec or 0 for clip in inspection.clips)
    return (f"{len(inspection.clips)} {kind[inspection.kind]}, {clock(seconds)} in all; cannot be used: {bad}; "
            f"worth a look: {odd}" + (f"; groups of copies: {len(inspection.alike)}" if inspection.alike else ""))


def is_inspection(path: Path) -> bool:
    """Return True if a file holds what :func:`to_json` returned for some data set."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"folder", "kind", "clips", "usable"}


def is_overview(path: Path) -> bool:
    """Return True if a file is the picture of some data set, which has this title in its head."""
    with open(path, "rb") as file:
        return f"Title\0{PNG_TITLE}".encode() in file.read(4096)


def to_json(inspection: Inspection) -> str:
    """Return the inspection as a JSON object; measurements that failed are null."""
    content = {**asdict(inspection), "usable": inspection.usable}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
