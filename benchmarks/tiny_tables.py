"""Figures of ``benchmarks/tiny_quality.py`` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selva.utils.document import begin_mark, marked_block
from selva.utils.text import clock, counted

PARTS = ("base", "selection", "adaptation", "guidance", "finetuning")  # in the order of the document
BEGIN_MARK = begin_mark("benchmarks/tiny_quality.py")
TITLE = "# tiny_16k: what the built-in model can do"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def base_text(part: dict[str, Any]) -> str:
    rows = []
    for key, what in {
        "generated": "generated",
        "ceiling": "ceiling: true sound through VAE and vocoder",
        "true_sound": "the true sound itself",
        "random_weights": "floor: generator with random weights",
    }.items():
        scores = part[key]
        rows.append((what, f"{scores['timing_f1']:.2f}", percent(scores["class_accuracy"])))
    floor = ("floor: generated, judged by another video's events", f"{part['generated']['shuffled_f1']:.2f}", "")
    rows.insert(3, floor)
    classes = [
        (name, f"{row['timing_f1']:.2f}", f"{row['shuffled_f1']:.2f}", f"{row['ceiling_f1']:.2f}",
         percent(row["class_accuracy"]), ", ".join(row["taken_for"]))
        for name, row in part["classes"].items()
    ]
    return (
        f"## Timing and class\n\n{counted(part['scenes'], 'scene')} with one object, seeds never used in training. "
        "Timing is the "
        "F1 of onsets within ±80 ms of the true events; class is the share that a classifier fitted on true sound "
        "recognises (goals: 0.75 and 85 %).\n\n"
        + table(("sound", "timing F1", "class recognised"), rows) + "\n"
        + table(("class", "timing F1", "other video", "ceiling", "recognised", "also taken for"), classes)
    )


def selection_text(part: dict[str, Any]) -> str:
    return (
        f"## Selection\n\n{counted(part['scenes'], 'scene')} with two objects, each generated twice, naming one and "
        "then the "
        "other (goal: F1 to the named one at least 0.3 above).\n\n"
        + table(("F1 to the named object", "F1 to the other", "difference", "class of the named recognised"),
                [(f"{part['f1_named']:.2f}", f"{part['f1_other']:.2f}", f"{part['difference']:.2f}",
                  percent(part["class_accuracy"]))])
    )


def adaptation_text(part: dict[str, Any]) -> str:
    rows = []
    for name, row in part.items():
        keeps = row["known_after"]["class_accuracy"] / max(row["known_before"]["class_accuracy"], 1e-9)
        rows.append((
            name, str(row["clips"]), clock(row["training_seconds"]), percent(row["before"]["class_accuracy"]),
            percent(row["after"]["class_accuracy"]), f"{row['before']['timing_f1']:.2f}",
            f"{row['after']['timing_f1']:.2f}", f"{percent(row['known_after']['class_accuracy'])} "
            f"({percent(keeps)} of before)", "yes" if row["strength_0_is_the_base_model"] else "NO",
        ))
    return (
        "## Teaching a new sound\n\nClasses that the model was not trained on, taught by `train_lora.py --config "
        "configs/tiny_new_sound.yaml`; judged on scenes that the adapter was not trained on (goals: at most 10 % "
        "before, 70 % after, timing within 0.1, 90 % of what it knew, at most 5 minutes on two cores).\n\n"
        + table(("class", "clips", "training", "recognised before", "after", "timing before", "after",
                 "known classes after", "strength 0 is the base model"), rows)
    )


def guidance_text(part: dict[str, Any]) -> str:
    rows = [
        (strength, f"{row['timing_f1']:.2f}", percent(row["class_accuracy"]), f"{row['margin']:.0f}")
        for strength, row in part["strengths"].items()
    ]
    negative = [
        (what, percent(row["avoided"]), percent(row["other"]), percent(row["sounds_like_avoided"]))
        for what, row in part["negative"].items()
    ]
    return (
        f"## Guidance and negative prompts\n\n{counted(part['scenes'], 'scene')} with one object; the margin is by how "
        "much "
        "the right class beats the next one in log probability.\n\n"
        + table(("cfg_strength", "timing F1", "class recognised", "margin"), rows)
        + f"\n{counted(part['negative_scenes'], 'scene')} with two objects, no prompt, and a negative prompt that "
          "names one of "
        "them:\n\n"
        + table(("negative prompt", "events of the avoided heard", "events of the other heard",
                 "sounds like the avoided"), negative)
    )


def finetuning_text(part: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['training_cpu_seconds']:.0f} s", f"{row['size_bytes'] / 1e6:.1f} MB",
         percent(row["before"]["class_accuracy"]), percent(row["after"]["class_accuracy"]),
         f"{row['after']['timing_f1']:.2f}", percent(row["known_before"]["class_accuracy"]),
         percent(row["known_after"]["class_accuracy"]), f"{row['known_after']['timing_f1']:.2f}")
        for name, row in part.items()
    ]
    return (
        "## An adapter, or the whole generator\n\nThe same clips of a new class, taught by `train_lora.py` and by "
        "`scripts/train_base.py --init`; what is kept is the adapter, or a generator.\n\n"
        + table(("class", "training", "kept", "recognised before", "after", "timing after", "known before",
                 "known after", "timing of known after"), rows)
    )


TEXTS = {"base": base_text, "selection": selection_text, "adaptation": adaptation_text, "guidance": guidance_text,
         "finetuning": finetuning_text}


def figures_text(figures: dict[str, Any]) -> str:
    """Return the block of the document that is made from figures."""
    return marked_block(BEGIN_MARK, [TEXTS[name](figures[name]) for name in PARTS if name in figures])
