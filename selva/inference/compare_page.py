"""Page of a comparison: every clip with the sounds of all setups side by side, to be heard and seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from selva.evaluation.page_sound import page_sound
from selva.utils.html_report import Page, ReportSound
from selva.utils.text import counted

MOST_SOUNDS = 24  # with players on a page, which stays below 5 MB so


def comparison_page(
    labels: Sequence[str],
    clips: Sequence[tuple[str, int, Tensor | None, Mapping[int, Tensor], Mapping[int, str]]],
    table: Sequence[Sequence[str]],
) -> Page:
    """Return the page.

    Args:
        labels: of the setups. table: of the mean figures, its header first.
        clips: (heading, rate, recorded sound or None, sounds by setup, a line about each), (samples,) each. As many as
            :data:`MOST_SOUNDS` allow get players, from the first on; the page says how many.
    """
    page = Page("Comparison", f"{', '.join(labels)}; {len(clips)} {'clip' if len(clips) == 1 else 'clips'}")
    page.section("Mean over all sounds", "Distances are to the recorded sounds, where there are any.")
    page.table(table[0], table[1:])
    each = max((len(sounds) + (recorded is not None) for _, _, recorded, sounds, _ in clips), default=1)
    shown = clips[: max(1, MOST_SOUNDS // each)]
    page.section("Listen", "" if len(shown) == len(clips) else
                 f"The first {len(shown)} of {counted(len(clips), 'clip')}; the sounds of the others are in the "
                 "folders beside this page.")
    for heading, rate, recorded, sounds, lines in shown:
        figures: list[ReportSound] = []
        if recorded is not None:
            figures.append(page_sound("recorded", "", recorded, rate))
        figures += [page_sound(labels[i], lines.get(i, ""), sounds[i], rate) for i in sorted(sounds)]
        page.sounds(heading, figures)
    return page
