"""End of a run: the verdict, the page about the run, and the model card, none of which can spoil what was trained."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selva.data.dataset import ClipDataset
from selva.models.variants import get_variant
from selva.training.config import RunConfig
from selva.training.memorisation import spread
from selva.training.model_card import CARD_FILE, card_text, write_card
from selva.training.report import PAGE_FILE, adapter_to_use, page_mark, run_page
from selva.training.run import TrainingRun
from selva.training.set_aside import CARD_MARK
from selva.training.verdict import PLANS, Verdict, VerdictPlan, log_verdict, plan_verdict, reach_verdict
from selva.utils.files import atomic_write_text
from selva.utils.metrics_log import MetricsFile
from selva.utils.text import counted
from selva.weights.find import check_weights

log = logging.getLogger(__name__)

VERDICT_FILE = "verdict.json"
PROMPTS_READ = 200  # clips whose prompts are looked at


@dataclass(frozen=True)
class About:
    """Content of the page beside the numbers of the run: the final adapter, lines about the data, settings as YAML."""

    adapter: Path
    data: list[str]
    settings: str


def decide_on_verdict(config: RunConfig, num_clips: int) -> VerdictPlan | None:
    """Return the plan of the verdict, None if there will be none; say which and why."""
    if not config.verdict:
        return None
    try:
        check_weights(config.model.variant, config.model.selva_dir, ("vocoder",))
    except FileNotFoundError as error:
        log.warning("no verdict at the end, which needs the vocoder: %s", str(error).split("\n")[0])
        return None
    recomputes = config.grad_checkpointing or config.checkpoint_blocks is not None
    plan = plan_verdict(config.training, num_clips, config.verdict_share, recomputes)
    if plan is None:
        log.info("no verdict at the end: even from %s it would take more than %.0f %% of this short training; "
                 "--verdict_share 100 makes one all the same", counted(PLANS[-1][0], "clip"),
                 100 * config.verdict_share)
        return None
    log.info("at the end a verdict from %s and 5 foreign prompts in %s, about %.1f %% of the training; --no_verdict "
             "leaves it out", counted(plan.num_clips, "clip"),
             counted(plan.num_steps, "solver step"), 100 * plan.share)
    return plan


def missing_outcome(final: Path, step: int, verdict: bool) -> list[str]:
    """Return the names of the files of :func:`write_outcome` that a finished run lacks, as one killed at its end does.

    Those that speak of another step are of a shorter run in this folder, and count as missing.

    Args:
        final: the final adapter. verdict: one is expected.
    """
    folder = final.parent
    spoken_of = {
        VERDICT_FILE: lambda text: json.loads(text).get("step") == step,
        CARD_FILE: lambda text: CARD_MARK not in text or f"| file | {final.name} |" in text,  # or of the user's own
        PAGE_FILE: lambda text: page_mark(final.name, step) in text,
    }
    missing = []
    for name, speaks_of_it in spoken_of.items():
        if name == VERDICT_FILE and not verdict:
            continue
        try:
            there = speaks_of_it((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, AttributeError):  # not there, damaged, no object
            there = False
        if not there:
            missing.append(name)
    return missing


def write_outcome(
    run: TrainingRun, clips: ClipDataset, config: RunConfig, metrics: MetricsFile, plan: VerdictPlan | None,
    about: About,
) -> None:
    """Judge the run, and write ``verdict.json``, ``README.md`` and ``report.html`` beside the final adapter.

    Whatever goes wrong here is said, and everything else is written: the adapter is there already.
    """
    run.feed.wait()  # nothing else reads the clips from now on
    folder, variant = about.adapter.parent, get_variant(config.model.variant)
    prompts = _prompts(clips)
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    verdict: Verdict | None = None
    if plan is not None:
        row = next((row for row in reversed(metrics.rows) if "val_loss" in row), None)
        row = row if row is not None and row["step"] == run.step else None
        verdict = _tried("no verdict", lambda: reach_verdict(run, clips, config, plan, variant, row))
    if verdict is not None:
        judged = verdict
        log_verdict(judged, sum(metrics.series("sec_per_step")[1]))
        text = json.dumps({"step": run.step, **judged.to_json()}, indent=2) + "\n"
        _tried(f"no {VERDICT_FILE}", lambda: atomic_write_text(folder / VERDICT_FILE, text))
    _tried("no model card", lambda: write_card(folder, card_text(about.adapter, meta, prompts, verdict,
                                                                adapter_to_use(run, about.adapter)[1])))

    def write_page() -> None:
        page = run_page(run, config, metrics, verdict, prompts, about.adapter, about.data, about.settings)
        page.write(folder / PAGE_FILE)
        log.info("%s: the page about this run, to be opened in a browser", folder / PAGE_FILE)

    _tried(f"no {PAGE_FILE}", write_page)


def _prompts(clips: ClipDataset) -> list[str]:
    """Return the prompts of the clips, the most frequent first; of a large set, those of evenly spread clips."""
    found = Counter(clips.clip(i).prompt for i in spread(len(clips), PROMPTS_READ))
    return [prompt for prompt, _ in found.most_common() if prompt]


def _tried(what: str, make: Callable[[], Any]) -> Any:
    """Return the result of ``make``; None after an error, which is said: the result of the training is safe."""
    try:
        return make()
    except Exception as error:  # whatever it is: the adapter is written, and so is the rest
        log.warning("%s: %s", what, str(error).strip().split("\n")[0] or type(error).__name__)
        log.debug("the error itself", exc_info=error)
        return None
