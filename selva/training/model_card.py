"""Model card: the ``README.md`` beside a final adapter, with the header that model hubs read."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selva.models.variants import MMAUDIO_REPO, SELVA_REPO
from selva.training.set_aside import CARD_MARK, is_model_card
from selva.training.verdict import Verdict
from selva.utils.files import atomic_write_text

log = logging.getLogger(__name__)

CARD_FILE = "README.md"


def card_text(
    adapter: Path, meta: Mapping[str, Any], prompts: list[str], verdict: Verdict | None, choice: str = ""
) -> str:
    """Return the card of an adapter.

    Args:
        meta: what the adapter stores. prompts: that it was trained with, the most frequent first.
        choice: sentence about which adapter of the run to use.
    """
    import yaml

    variant = str(meta.get("variant", "?"))
    header: dict[str, Any] = {"tags": ["lora", "video-to-audio", "selva-lora", variant],
                              "pipeline_tag": "text-to-audio"}
    if variant != "tiny_16k":
        header |= {"base_model": MMAUDIO_REPO if variant.startswith("mmaudio") else SELVA_REPO,
                   "base_model_relation": "adapter"}
    prompt = prompts[0] if prompts else ""
    rows = [("base model", variant), ("rank", meta.get("rank")), ("layers", " ".join(meta.get("target", []))),
            ("steps", meta.get("step", meta.get("steps"))), ("clips", meta.get("num_clips")),
            ("CLIP frame features", meta.get("clip_features")), ("file", adapter.name)]
    lines = [
        "---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", CARD_MARK, "",
        f"# {prompt or adapter.parent.name}", "",
        f"An adapter (LoRA) for `{variant}`, a model that makes sound for videos.", "",
        "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows if value not in (None, "")), "",
        "## Use", "", "```bash", use_command(adapter.name, variant, prompt), "```", "",
        *([choice, ""] if choice else []),
    ]
    if prompts:
        lines += ["Prompts of the training: " + ", ".join(f"`{_cell(text)}`" for text in prompts[:10])
                  + (f" and {len(prompts) - 10} more" if len(prompts) > 10 else "") + ".", ""]
    lines += ["## What was measured", "", verdict.line() + "." if verdict else "No verdict was computed.", "",
              "`report.html` in the folder of the run has the sounds and the curves. The next final adapter of "
              "this folder replaces this text, unless the mark at its top is removed; licence and rights of the "
              "recordings are yours to state.", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def use_command(adapter: str, variant: str, prompt: str) -> str:
    """Return the command that makes sound with an adapter."""
    weights = "" if variant == "tiny_16k" else " --selva_dir weights"
    return (f"python infer.py --video new.mp4 --prompt {shlex.quote(prompt)} --variant {variant}{weights} "
            f"--adapter {shlex.quote(adapter)} --output output")


def write_card(folder: Path, text: str) -> None:
    """Write the card as ``README.md``; a file of the user's own stays, which is said.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_model_card(path):
        log.warning("%s is not of this program and stays as it is; the model card is model_card.md", path)
        path = folder / "model_card.md"
    atomic_write_text(path, text)
