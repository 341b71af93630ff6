"""Captions where extraction, partition and training look for them: a text beside each clip, or lines of a prompts.txt.

A text that a user has written or edited stays as it is, and is named.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from selva.inputs.file_names import same_name
from selva.inputs.prompts import PROMPTS_FILE, read_prompts, read_sidecar
from selva.partition.pieces import WrittenFiles
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.text import counted, listed, read_text

log = logging.getLogger(__name__)

Outcome = Literal["written", "as before", "kept"]


class CaptionFiles:
    """Captions of the clips of a folder, written one by one.

    Args:
        written: what was written to the folder before.
        prompts: a prompts.txt, in which a clip that has a line keeps it; None writes ``<name>.txt`` beside each clip.

    Raises:
        UserError: ``prompts`` is not UTF-8 text.
    """

    def __init__(self, written: WrittenFiles, prompts: Path | None = None) -> None:
        self.written, self.prompts = written, prompts
        self.kept: list[str] = []
        self.num_written = 0
        self._lines: list[str] = []
        self._listed: dict[str, str] | None = None  # of the prompts.txt, read when first needed
        if prompts is not None and prompts.is_file() and prompts.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{prompts}: is UTF-16 text, to which nothing is added; save it as UTF-8")

    def write(self, clip: Path, caption: str) -> Outcome:
        """Write the caption of a clip unless the user has another one there; with a prompts.txt, see :meth:`close`.

        Raises:
            UserError: the name of the clip cannot stand in such a file, or the text there is neither UTF-8 nor UTF-16.
        """
        before = self.caption_of(clip)
        if before == caption:
            return "as before"
        if self.prompts is not None:
            if before:
                return self._keep(clip)
            if ":" in clip.stem or clip.stem != clip.stem.strip():
                raise UserError(f"{clip}: a colon or a space at an end of a name cannot stand in {self.prompts.name}; "
                                "rename the clip")
            self._lines.append(f"{clip.stem}.npz: {caption}")
        else:
            note = clip.with_suffix(".txt")
            if note.name == PROMPTS_FILE:
                raise UserError(f"{clip}: its caption would be called {PROMPTS_FILE}, which is a list; rename the clip")
            if not self.written.may_write(note):
                return self._keep(clip)
            atomic_write_text(note, f"{caption}\n")
            self.written.add(note)
        self.num_written += 1
        return "written"

    def caption_of(self, clip: Path) -> str:
        """Return the caption that a clip has already, several of a text on a line each; "" if it has none."""
        if self.prompts is None:
            note = clip.with_suffix(".txt")
            return "\n".join(read_sidecar(note)) if note.name != PROMPTS_FILE and note.is_file() else ""
        if self._listed is None:
            names = [path.stem for path in clip.parent.iterdir()]
            self._listed = read_prompts(self.prompts, names) if self.prompts.is_file() else {}
        return self._listed.get(same_name(f"{clip.stem}.npz"), "")

    def _keep(self, clip: Path) -> Outcome:
        self.kept.append(clip.stem)
        return "kept"

    def close(self) -> None:
        """Add the lines to the prompts.txt, whole or not at all, and say what was written and what was kept."""
        if self.prompts is not None and self._lines:
            before = read_text(self.prompts) if self.prompts.is_file() else ""
            gap = "\n" if before and not before.endswith(("\n", "\r")) else ""
            atomic_write_text(self.prompts, before + gap + "".join(f"{line}\n" for line in self._lines))
        where = f"to {self.prompts}" if self.prompts is not None else "as <name>.txt beside the clips"
        if self.num_written:
            log.info("%s written %s", counted(self.num_written, "caption"), where)
        if self.kept:
            log.warning("not replaced, as these have a caption of yours: %s", listed(sorted(self.kept)))
