"""Models of transformers in local folders: found, checked and loaded; nothing is downloaded here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from selva.utils.errors import UserError
from selva.utils.text import listed

log = logging.getLogger(__name__)


def model_folder(place: str, example: str) -> Path:
    """Return the folder of a model: a folder as it is, or one that Hugging Face's cache holds of a name.

    Args:
        place: a folder, or a name such as openai/whisper-small. example: such a name, for the error.

    Raises:
        FileNotFoundError: neither; says what to download.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(place).expanduser()
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(place, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        wanted = place if place.count("/") == 1 and not place.startswith(("/", ".", "~")) else example
        raise FileNotFoundError(
            f"{place}: no such folder, and no model of that name in the cache of Hugging Face; download one: "
            f"hf download {wanted} --local-dir {wanted.rpartition('/')[2]}") from None


def load_from_folder(folder: Path, model: str, processor: str, example: str) -> tuple[Any, Any]:
    """Return a model of transformers in eval mode, without gradients, and its processor.

    Args:
        model, processor: names of classes of transformers. example: a model of that kind on Hugging Face.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: it holds a model of another kind, one that lacks weights, or none that can be read.
    """
    import transformers

    if not folder.is_dir():
        raise FileNotFoundError(2, f"no such folder; download {example} from Hugging Face into one", str(folder))
    network_class = getattr(transformers, model)
    _check_kind(folder, network_class.config_class.model_type, example)
    transformers.utils.logging.disable_progress_bar()
    try:
        network, report = network_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        loaded = getattr(transformers, processor).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be read as a {model} with its {processor}; expected the files of {example} "
                        f"({reason})") from error
    # transformers would fill these with random numbers and only warn.
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: lacks weights of a {model}: {listed(missing, 3)}; expected the files of {example}")
    return network.eval().requires_grad_(False), loaded


def _check_kind(folder: Path, kind: str, example: str) -> None:
    """Raise if the folder says that it holds another kind of model, which transformers would load as this one."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # said by the loader itself
    found = content.get("model_type") if isinstance(content, dict) else None
    if found != kind:
        raise UserError(f"{folder}: holds a model of the kind {found}, expected {kind}, such as {example}")
