"""Write docs/findings.md from the rows of `soundbench.py`: every claim, our figures with intervals, and the verdict.

    python benchmarks/findings.py

A verdict needs as many runs of a method, on the same cells as its reference, as --decided_after says. Until then it is
"not decided yet", whatever the figures look like.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sound_plan import CHECKPOINTS, PLAN_FILE, ROOT, Cell, Method, Plan, Question, read_plan
from sound_rows import Interval, Row, cell_of, compared, hits, interval, read_rows, scenes_of_all, steps_to
from tiny_tables import table

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.utils.document import begin_mark, marked_block, update_document
from selva.utils.errors import UserError
from selva.utils.text import counted, listed

BEGIN_MARK = begin_mark("benchmarks/findings.py")
DOCUMENT = ROOT / "docs" / "findings.md"
ROWS_FILE = ROOT / "benchmarks" / "soundbench.jsonl"
DECIDED_AFTER = 9  # three sounds and three seeds
MEMORISED = 0.6  # area under the curve from which on a run counts as learned by heart
PATIENCE = (1, 2, 3, 4)
OVERVIEW_FROM = 4  # methods: fewer can be seen at a glance in their own tables
NEAR = 0.02 + 1e-9  # of the best checkpoint: as good as it
Rows = Sequence[Row]
SETS = {"judge": "scenes that were used for nothing else", "select": "scenes that settings were chosen by",
        "first": "the same scenes, heard by the judge as it was before the violin was changed"}


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("findings")
    group.add_argument("--results", type=Path, default=ROWS_FILE, help="rows of soundbench.py")
    group.add_argument("--plan", type=Path, default=PLAN_FILE, help="methods and questions")
    group.add_argument("--document", type=Path, default=DOCUMENT, help="the part between its two marks is replaced")
    group.add_argument("--decided_after", type=cli.positive_int, default=DECIDED_AFTER,
                       help="runs of a method that a verdict needs")
    parser.add_common(seed=False, device=False)
    return parser


# -- figures -----------------------------------------------------------------------------------------------------------


def last(row: Row) -> Row:
    """Return the figures of the last checkpoint."""
    return row["checkpoints"][-1]


def recognised(row: Row) -> list[float]:
    return hits(last(row)["new"])


def known(row: Row) -> list[float]:
    """Return 1 for every known scene that is recognised, 0 for the others."""
    return hits(last(row)["known"])


def kept(row: Row) -> list[float]:
    """Return the same for those known scenes only that the base model gets right."""
    return [after for after, before in zip(known(row), hits(row["base"]["known"]), strict=True) if before]


def distances(row: Row) -> list[float]:
    """Return the distance of every new scene to its true sound in dB."""
    return last(row)["new"]["distances_db"]


def figure(values: Callable[[Row], list[float]], rows: Rows) -> Interval:
    return interval([values(row) for row in rows])


def cost(row: Row) -> float:
    """Return the CPU seconds of a training, with those of the sounds that it preserves."""
    return row["train_cpu_sec"] + row["preserve_cpu_sec"]


def cost_ratio(rows: Rows, references: Rows) -> float | None:
    """Return the seconds of a method over those of its reference, of the cells that one kind of processor did for both.

    The making of sounds to preserve does not count, as rows of commits before 9413c19 made theirs in twice the steps.
    None if there are no such cells, or if only one of both makes any.
    """
    theirs = {(cell_of(row), row.get("processor")): row for row in references}
    pairs = [(row, theirs[place]) for row in rows if (place := (cell_of(row), row.get("processor"))) in theirs]
    if not pairs or any(bool(row["preserve_cpu_sec"]) != bool(other["preserve_cpu_sec"]) for row, other in pairs):
        return None
    return sum(row["train_cpu_sec"] for row, _ in pairs) / sum(other["train_cpu_sec"] for _, other in pairs)


def cost_text(rows: Rows, references: Rows | None) -> str:
    """Return the seconds of a reference, or how many times those of its reference a method takes; "" if unknown."""
    if references is None:
        return f"{fmean(map(cost, rows)):.0f} s"
    share = cost_ratio(rows, references)
    return "" if share is None else f"x {share:.2f}"


def verdict(rows: Rows, references: Rows, decided_after: int) -> str:
    """Return the verdict on a method in words, by the intervals of its differences from the reference."""
    cells = {(row["sound"], row["seed"]) for row in rows} & {(row["sound"], row["seed"]) for row in references}
    if len(cells) < decided_after:
        return f"not decided yet: {len(cells)} of {counted(decided_after, 'run')}"
    words = []
    for what, values in (("learns", recognised), ("keeps", known)):
        difference = compared(rows, references, values)
        if difference.excludes(0):
            words.append(f"{what} {'more' if difference.mean > 0 else 'less'}")
    if (difference := compared(rows, references, distances)).excludes(0):
        words.append(f"sounds {'nearer' if difference.mean < 0 else 'less near'}")
    share = cost_ratio(rows, references)
    seconds = f", {share:.1f} times the seconds" if share is not None and not 0.9 < share < 1.1 else ""
    return (", ".join(words) or "no difference beyond the intervals") + seconds


# -- text --------------------------------------------------------------------------------------------------------------


def percent(value: Interval, sign: bool = False) -> str:
    """Return a share with its bounds, in percent; a difference with its sign; "" for none."""
    if value.mean != value.mean:
        return ""
    form = "{:+.0f}" if sign else "{:.0f}"
    bounds = "" if value.low is None or value.high is None else (
        f" ({form.format(100 * value.low)} to {form.format(100 * value.high)})")
    return f"{form.format(100 * value.mean)}{bounds}"


def plain(value: Interval) -> str:
    """Return a difference with its bounds; "" for none."""
    if value.mean != value.mean:
        return ""
    bounds = "" if value.low is None or value.high is None else f" ({value.low:+.2f} to {value.high:+.2f})"
    return f"{value.mean:+.2f}{bounds}"


def rows_of(method: Method, rows: Rows) -> list[Row]:
    """Return the rows of a method's settings, whatever it was called when they were made."""
    return [row for row in rows if row["key"].endswith(f"-{method.identity}")]


def question_text(question: Question, plan: Plan, rows: Rows, decided_after: int, alone: bool = False) -> str:
    """Return the section of a question; "" if it has no runs, or ``alone`` is False and only its reference has any."""
    found = {name: rows_of(plan.methods[name], rows) for name in question.methods}
    if not any(own for name, own in found.items() if alone or name != question.reference):
        return ""
    references = found[question.reference]
    header = ("method", "runs", "recognised %", "difference", "worst", "kept %", "difference", "worst",
              "timing new, known", "memorised", "distance dB", "difference", "CPU time", "verdict")
    lines = []
    for name, own in found.items():
        if not own:
            continue
        is_reference = name == question.reference
        differences = ["", ""] if is_reference else [
            percent(compared(own, references, values), sign=True) for values in (recognised, known)]
        nearer = "" if is_reference else plain(compared(own, references, distances))
        timing = ", ".join(f"{fmean(last(row)[part]['timing_f1'] for row in own):.2f}" for part in ("new", "known"))
        lines.append((
            name, str(len(own)), percent(figure(recognised, own)), differences[0], worst(recognised, own),
            percent(figure(kept, own)), differences[1], worst(kept, own), timing,
            f"{fmean(last(row)['member_auc'] for row in own):.2f}",
            f"{fmean(last(row)['new']['distance_db'] for row in own):.2f}", nearer,
            cost_text(own, None if is_reference else references),
            "the reference" if is_reference else verdict(own, references, decided_after),
        ))
    changes = "; ".join(f"{name}: {changes_text(plan.methods[name])}" for name, own in found.items() if own)
    missing = [name for name, own in found.items() if not own]
    verdict_text = f"\n**Verdict:** {question.verdict}\n" if question.verdict else ""
    without = f" Not run here: {listed(missing, len(missing))}." if missing else ""
    return (f"### {question.title}\n\n*Claim:* {question.claim} *From:* {question.source}.\n\n{table(header, lines)}\n"
            f"On the base `{question.base}`: {changes}.{without}\n{verdict_text}")


def overview_text(plan: Plan, rows: Rows, decided_after: int) -> str:
    """Return a table with one line for every method that was compared; "" for a few only."""
    lines = []
    for question in plan.questions:
        references = rows_of(plan.methods[question.reference], rows)
        for name in question.methods:
            own = rows_of(plan.methods[name], rows)
            if name == question.reference or not own or not references:
                continue
            shares = (percent(compared(own, references, values), sign=True) for values in (recognised, known))
            lines.append((question.title, name, changes_text(plan.methods[name]), str(len(own)), *shares,
                          plain(compared(own, references, distances)), verdict(own, references, decided_after)))
    if len(lines) < OVERVIEW_FROM:
        return ""
    header = ("question", "method", "what it changes", "runs", "recognised, difference", "known, difference",
              "distance dB, difference", "verdict")
    return ("### At a glance\n\nEvery method beside the reference of its question. Of 20 intervals about one excludes "
            f"0 by chance alone.\n\n{table(header, lines)}")


def worst(values: Callable[[Row], list[float]], rows: Rows) -> str:
    return f"{100 * min(fmean(values(row)) for row in rows):.0f}"


def flag_text(name: str, value: Any) -> str:
    words = [] if value is True else map(str, value if isinstance(value, list) else [value])
    return f"`{' '.join([f'--{name}', *words])}`"


def bases_text(plan: Plan) -> str:
    """Return the settings of the bases, which the methods change."""
    lines = (f"- `{name}`: {' '.join(flag_text(*one) for one in base.items() if one[1] is not False)}"
             for name, base in plan.bases.items())
    return "## Bases\n\nWhat the methods change:\n\n" + "\n".join(lines) + "\n"


def changes_text(method: Method) -> str:
    """Return the changes that a method makes to the settings of its base, as flags."""
    words = [flag_text(*one) for one in method.changes.items()]
    if method.wordings > 1:
        words.append(f"{counted(method.wordings, 'prompt')} for every clip")
    if not method.pictures:
        words.append("clips of sound alone")
    if method.soup:
        parts = counted(method.soup["seeds"], "training") + " by other seeds" if "seeds" in method.soup else (
            f"the last {counted(method.soup['last'], 'step file')}, {counted(method.soup['every'], 'step')} apart")
        words.append(f"the average of {parts}, cut back to the rank")
    return ", ".join(words) or "as it is"


def sounds_text(rows: Rows) -> str:
    """Return the table of the sounds: what the base model, the best run and the autoencoder make of each."""
    lines = []
    for sound in dict.fromkeys(row["sound"] for row in rows):
        own = [row for row in rows if row["sound"] == sound]
        ceilings = [row["ceiling"] for row in own if "ceiling" in row]  # the same in all; older rows have none
        restored = [f"{100 * one['recognised']:.0f}" for one in ceilings[:1]] or [""]
        restored += [f"{one['distance_db']:.1f}" for one in ceilings[:1]] or [""]
        shares = [fmean(recognised(row)) for row in own]
        lines.append((sound, str(len(own)), f"{100 * fmean(hits(own[0]['base']['new'])):.0f}",
                      f"{100 * fmean(shares):.0f}", f"{100 * max(shares):.0f}", *restored))
    header = ("sound", "runs", "base model", "all runs", "best run", "autoencoder", "autoencoder, dB")
    return ("### The sounds\n\nThe share of the new scenes that is recognised, in %: of the base model, in the mean of "
            "all runs, of the best one, and of the true sounds when the autoencoder and the vocoder have given them "
            "back, with their distance. No adapter can be expected to do better than the last.\n\n"
            + table(header, lines))


def response_text(plan: Plan, rows: Rows) -> str:
    """Return the tables of what an adapter does at every strength, a line for each method; "" without such runs."""
    lines: dict[str, list[tuple[str, ...]]] = {"recognised": [], "distance_db": []}
    strengths: list[float] = []
    for name, method in plan.methods.items():
        own = [row for row in rows_of(method, rows) if row["response"]]
        if not own:
            continue
        responses = [whole_response(row) for row in own]
        strengths = list(responses[0])
        for what, form, factor in (("recognised", "{:.0f}", 100), ("distance_db", "{:.1f}", 1)):
            means = (factor * fmean(one[strength][what] for one in responses) for strength in strengths)
            lines[what].append((name, str(len(own)), *map(form.format, means)))
    if not strengths:
        return ""
    header = ("method", "runs", *(f"{strength:g}" for strength in strengths))
    return ("### Strength\n\nThe same few new scenes (8) with the adapter at every strength, seed 1. The share that is "
            f"recognised, in %:\n\n{table(header, lines['recognised'])}\nThe distance to the true sounds, in dB:\n\n"
            + table(header, lines["distance_db"]))


def whole_response(row: Row) -> dict[float, Mapping[str, float]]:
    """Return the figures at every strength, those of the base model and of the adapter as it is among them."""
    count = row["response"][0]["scenes"]
    ends = {0.0: row["base"]["new"], 1.0: last(row)["new"]}
    found: dict[float, Mapping[str, float]] = {
        strength: {"recognised": fmean(hits(part)[:count]), "distance_db": fmean(part["distances_db"][:count])}
        for strength, part in ends.items()
    }
    found |= {one["strength"]: one for one in row["response"]}
    return dict(sorted(found.items()))


def wordings_text(plan: Plan, rows: Rows) -> str:
    """Return the table of scenes whose wording a clip has and of those in other words; "" without any of the latter."""
    from sound_data import trained_wordings

    lines = []
    for name, method in plan.methods.items():
        shares: dict[bool, list[float]] = {True: [], False: []}
        own = rows_of(method, rows)
        for row in own:
            cell = Cell(row["scenes"].replace("first", "select"), row["sound"], row["clips"], row["seed"])
            outcomes = recognised(row)
            flags = trained_wordings(cell, method.wordings, len(outcomes))
            for trained, hit in zip(flags, outcomes, strict=True):
                shares[trained].append(hit)
        if shares[False]:
            lines.append((name, str(len(own)), *(text for trained in (True, False) for text in (
                str(len(shares[trained])), f"{100 * fmean(shares[trained]):.0f}" if shares[trained] else ""))))
    if not lines:
        return ""
    header = ("method", "runs", "scenes in words of the clips", "recognised %", "scenes in other words", "recognised %")
    return ("### Other words\n\nThe scenes of the new sound whose prompt is worded as that of a clip (the colour may "
            f"be another), and those that are asked for in words that no clip has.\n\n{table(header, lines)}")


def on_the_way_text(plan: Plan, rows: Rows) -> str:
    """Return the table of the checkpoints, on the scenes that judge all of a run; "" without runs that have several."""
    lines = []
    for name, method in plan.methods.items():
        own = [row for row in rows_of(method, rows) if len(row["checkpoints"]) > 1]  # others have but their end
        for place in range(min((len(row["checkpoints"]) for row in own), default=0)):
            found = [row["checkpoints"][place] for row in own]
            shares = [fmean(fmean(hits(row["checkpoints"][place][part])[: scenes_of_all(row, part)]) for row in own)
                      for part in ("new", "known")]
            others = [fmean(one[figure] for one in found) for figure in ("val_loss", "member_auc")]
            reached = sum((step := steps_to(row)) is not None and step <= found[0]["step"] for row in own)
            lines.append((name, str(len(own)), str(found[0]["step"]), *(f"{100 * share:.0f}" for share in shares),
                          str(reached), f"{others[0]:.3f}", f"{others[1]:.2f}"))
    if not lines:
        return ""
    header = ("method", "runs", "step", "recognised %", "known recognised %", "runs at 90 %", "held-out loss",
              "memorised")
    return ("### Along the way\n\nThe checkpoints of a run, all judged on the same few scenes (8 of the new sound, 10 "
            f"known ones), so that they can be compared with each other and not with the tables above.\n\n"
            f"{table(header, lines)}")


# Rules that choose the checkpoint to keep, from what a training knows by itself.
RULES: dict[str, Callable[[Rows], Row]] = {
    "the last": lambda checkpoints: checkpoints[-1],
    "lowest held-out loss": lambda checkpoints: min(checkpoints, key=lambda one: one["val_loss"]),
    "least memorised": lambda checkpoints: min(checkpoints, key=lambda one: one["member_auc"]),
    f"lowest held-out loss with at most {MEMORISED:g} memorised, else the least memorised": lambda checkpoints: min(
        checkpoints, key=lambda one: (max(one["member_auc"], MEMORISED), one["val_loss"])),
    "the first": lambda checkpoints: checkpoints[0],
}


def score(checkpoint: Row, row: Row) -> float:
    """Return the mean of the shares of new and of known scenes that are recognised, of those that judge all."""
    return fmean(fmean(hits(checkpoint[part])[: scenes_of_all(row, part)]) for part in ("new", "known"))


def keeping_text(rows: Rows) -> str:
    """Return the table of the rules that choose a checkpoint, beside the best choice in hindsight; "" without any."""
    rows = [row for row in rows if len(row["checkpoints"]) > 1]
    if not rows:
        return ""
    best = [max(score(one, row) for one in row["checkpoints"]) for row in rows]
    lines = []
    for name, rule in RULES.items():
        behind = [top - score(rule(row["checkpoints"]), row) for top, row in zip(best, rows, strict=True)]
        near = sum(one < NEAR for one in behind)
        lines.append((name, f"{near} of {len(rows)}", percent(interval([[one] for one in behind])),
                      f"{100 * max(behind):.0f}"))
    header = ("rule", "within two points of the best", "points behind it", "at worst")
    return ("### Which checkpoint to keep\n\nOf every run the checkpoint that a rule would keep, beside the best one "
            "in hindsight. What counts is the mean of the shares of new and of known scenes that are recognised, on "
            f"the same few scenes as above; one new scene is 6 points.\n\n{table(header, lines)}")


def patience_text(rows: Rows) -> str:
    """Return the table of what `--patience` would have done; "" without runs of more checkpoints than are usual."""
    rows = [row for row in rows if len(row["checkpoints"]) > CHECKPOINTS]
    if not rows:
        return ""
    lines = []
    for patience in PATIENCE:
        read = [checkpoints_read(row["checkpoints"], patience) for row in rows]
        lowest = [min(some, key=lambda one: one["val_loss"]) for some in read]
        whole = [min(row["checkpoints"], key=lambda one: one["val_loss"]) for row in rows]
        lost = [score(end, row) - score(stopped, row)
                for row, stopped, end in zip(rows, lowest, whole, strict=True)]
        ended = sum(len(some) < len(row["checkpoints"]) for row, some in zip(rows, read, strict=True))
        steps = fmean(some[-1]["step"] / row["checkpoints"][-1]["step"] for row, some in zip(rows, read, strict=True))
        lines.append((str(patience), f"{ended} of {len(rows)}", f"{100 * steps:.0f}",
                      percent(interval([[one] for one in lost]), sign=True), f"{100 * max(lost):.0f}"))
    header = ("validations of patience", "runs that end early", "steps done, %", "points lost", "at worst")
    return ("### When to stop\n\nWhat `--patience` would have done to the runs with more than the usual checkpoints, "
            "had each been a validation: `adapter_best` is the one with the lowest held-out loss until then, beside "
            f"that of the whole run.\n\n{table(header, lines)}")


def checkpoints_read(checkpoints: Rows, patience: int) -> Rows:
    """Return the checkpoints of a run that ends when ``patience`` of them in a row are no better than the best one."""
    best, worse = float("inf"), 0
    for count, one in enumerate(checkpoints, 1):
        best, worse = (one["val_loss"], 0) if one["val_loss"] < best else (best, worse + 1)
        if worse == patience:
            return checkpoints[:count]
    return checkpoints


def sections(plan: Plan, rows: Rows, decided_after: int) -> Iterator[str]:
    """Yield the parts of the document: for every set of scenes and number of clips all questions."""
    order = list(SETS)
    yield bases_text(plan)
    for scenes, clips in sorted({(row["scenes"], row["clips"]) for row in rows},
                                key=lambda one: (order.index(one[0]), -one[1])):
        own = [row for row in rows if (row["scenes"], row["clips"]) == (scenes, clips)]
        machines = dict.fromkeys(row["processor"] for row in own if "processor" in row)
        where = f", on {listed(list(machines), len(machines))}" if machines else ""
        yield f"## {counted(clips, 'clip')}, {SETS[scenes]}\n\n{counted(len(own), 'run')} so far{where}.\n"
        yield from filter(None, [overview_text(plan, own, decided_after)])
        yield sounds_text(own)
        texts = [question_text(question, plan, own, decided_after) for question in plan.questions]
        if not any(texts):  # a method that was judged by itself
            alone = (question_text(question, plan, own, decided_after, alone=True) for question in plan.questions)
            texts = [next(filter(None, alone), "")]
        yield from filter(None, texts)
        yield from filter(None, (wordings_text(plan, own), on_the_way_text(plan, own), keeping_text(own),
                                 patience_text(own), response_text(plan, own)))


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows = read_rows(args.results)
    if not rows:
        raise UserError(f"{args.results}: no rows; python benchmarks/soundbench.py makes them")
    plan = read_plan(args.plan)
    block = marked_block(BEGIN_MARK, list(sections(plan, rows, args.decided_after)))
    update_document(args.document, BEGIN_MARK, block, "# What every switch does, measured")
    print(args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
