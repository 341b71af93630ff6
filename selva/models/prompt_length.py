"""Length of a prompt that the text encoder reads: CLIP takes 77 tokens, start and end included, and no more."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

from selva.models.config import ClipConfig
from selva.utils.text import MAX_LISTED, counted, listed

log = logging.getLogger(__name__)

_SHOWN_NAMES, _SHOWN_LETTERS = 5, 40


def part_that_is_read(prompt: str, config: ClipConfig) -> str | None:
    """Return the beginning of a prompt that CLIP reads, cleaned as CLIP does it; None if it reads all of it."""
    length = config.context_length - 2  # without start and end
    if len(prompt.encode("utf-8", errors="replace")) <= length:  # a token has at least one byte
        return None
    if config.byte_tokens:
        content = " ".join(prompt.lower().split()).encode("utf-8", errors="replace")
        return None if len(content) <= length else content[:length].decode("utf-8", errors="ignore")
    tokenizer = _word_pieces()
    tokens = tokenizer.encode(prompt)
    return None if len(tokens) <= length else tokenizer.decode(tokens[:length]).strip()


@functools.lru_cache(maxsize=1)
def _word_pieces():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def warn_of_cut_prompts(prompts: Iterable[tuple[str, str]], config: ClipConfig) -> None:
    """Name in the log the prompts that are too long, the clips that have them, and where they are cut.

    Args:
        prompts: (name of the clip, prompt).
    """
    names: dict[str, list[str]] = {}
    for name, prompt in prompts:
        names.setdefault(prompt, []).append(name)
    cut = {prompt: read for prompt in names if (read := part_that_is_read(prompt, config)) is not None}
    for prompt, read in list(cut.items())[:MAX_LISTED]:
        log.warning("%s: the prompt is longer than the %s that the text encoder reads; what follows %r is not "
                    "read", listed(names[prompt], _SHOWN_NAMES), counted(config.context_length, "token"),
                    read[-_SHOWN_LETTERS:])
    if len(cut) > MAX_LISTED:
        rest = [name for prompt in list(cut)[MAX_LISTED:] for name in names[prompt]]
        log.warning("%s too long and cut: of %s", counted(len(cut) - MAX_LISTED, "more prompt is", "more prompts are"),
                    listed(rest))
