"""Common to the parts of `gpu.py`: rows of figures, the time that is left, networks of random weights, tables."""

from __future__ import annotations

import gc
import logging
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from measure import Bench, clock
from torch import nn

from selva.models.clip_t5 import meta_clip
from selva.models.generator import Generator
from selva.models.random_weights import random_state_dict
from selva.models.variants import Variant, get_variant
from selva.models.zoo import build_generator
from selva.utils.device import is_out_of_memory

if TYPE_CHECKING:
    from open_clip.model import CLIP

log = logging.getLogger("selva.benchmark")

Module = TypeVar("Module", bound=nn.Module)
MOST_DIGITS = 3
RING_AGAIN_SEC = 5.0  # the alarm rings until the part has ended: what it raises in a destructor, Python drops


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what, size: of what, at which size. value, unit: the figure; "s" and "GiB" are made readable.
        limit: what it may be at most, for a result that would otherwise be wrong. aim: what it shall be at most.
        note: what one has to know beside it.
    """

    what: str
    size: str
    value: float
    unit: str
    limit: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def wrong(self) -> bool:
        """True where the figure is beyond its limit, or no number."""
        return self.limit is not None and not self.value <= self.limit

    def stored(self) -> dict[str, Any]:
        return {**asdict(self), "wrong": self.wrong}


@dataclass(frozen=True)
class Setup:
    """Surroundings of all parts.

    Attributes:
        bench: times calls on the device. small: take the smallest sizes, to see that everything runs.
        until: ``time.monotonic()`` at which the whole has to be over.
    """

    bench: Bench
    small: bool
    until: float

    @property
    def device(self) -> torch.device:
        return self.bench.device

    def seconds_left(self) -> float:
        return max(0.0, self.until - time.monotonic())

    def variants(self, *names: str) -> list[Variant]:
        """Return variants; of the smallest sizes only ``tiny_16k``."""
        return [get_variant(name) for name in (("tiny_16k",) if self.small else names)]

    def pick(self, full: Any, small: Any) -> Any:
        return small if self.small else full


@dataclass(frozen=True)
class Gap:
    """Something that was not measured, "" for the rest of a part, and the reason; a ``fault`` unless that is memory."""

    what: str
    reason: str
    fault: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}" if self.what else self.reason


Rows = Iterator[Row | Gap]
Part = Callable[[Setup], Rows]  # rows as they come


class OutOfTime(BaseException):
    """The time of a part is over; a BaseException, as graphs, compilers and logging go on after any other error."""


def guarded(setup: Setup, what: str, rows: Rows) -> Rows:
    """Yield rows, and the reason if they end with an error: the next ones are worth having whatever it is."""
    try:
        yield from rows
    except Exception as error:  # becomes a row of the results, with its place; the other parts still run
        log.debug("%s", what, exc_info=True)
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        yield Gap(what, reason, fault=not is_out_of_memory(error))
    finally:
        free(setup.device)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the block after some seconds, where the system has alarms (not on Windows)."""
    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), RING_AGAIN_SEC)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let the alarm of :func:`time_limit` wait for the end of the block, which writes a file."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    rung: list[tuple[int, Any]] = []
    ring = signal.signal(signal.SIGALRM, lambda *rang: rung.append(rang))  # a mask would be that of one thread only
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, ring)
    if rung and callable(ring):
        ring(*rung[0])


def filled(network: Module, device: torch.device) -> Module:
    """Return a network on a device with random weights drawn there, frozen, ready to be used.

    A large model is filled within a second; its weights depend on the device, unlike those of ``fill_random_``.
    """
    rng = torch.Generator(device).manual_seed(0)

    def noise(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        return torch.empty(shape, device=device).uniform_(-math.sqrt(3), math.sqrt(3), generator=rng)

    network = network.to(device)
    weights = random_state_dict(network, noise=noise)
    getattr(network, "load_published", network.load_state_dict)(weights)
    return network.eval().requires_grad_(False)


def filled_generator(variant: Variant, device: torch.device) -> Generator:
    """Return a generator with random weights; without drawing on the CPU what is overwritten."""
    with torch.device("meta"):
        network = build_generator(variant.generator)
    return filled(network.to_empty(device=device), device)


def filled_clip(variant: Variant, device: torch.device) -> CLIP:
    """Return both towers of CLIP as extraction runs them, with random weights, as :func:`filled_generator` does."""
    clip = filled(meta_clip(variant.clip).to_empty(device=device), device)
    length = variant.clip.context_length
    clip.attn_mask = torch.full((length, length), -torch.inf, device=device).triu_(1)  # computed, in no file
    return clip


def free(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- tables ------------------------------------------------------------------------------------------------------------


def table(figures: dict[str, Any]) -> str:
    """Return the figures of one card as Markdown: a table for each part, errors and what was left out in words."""
    lines = [f"### {figures['title']}", "", f"{figures['seconds']:.0f} s in all, {figures['software']}."]
    for name, part in figures["parts"].items():
        lines += ["", f"**{name}: {part['about']}** ({part['seconds']:.0f} s)", ""]
        rows = part["rows"]
        if rows:
            lines += ["| what | size | measured | at most | |", "|---|---|---|---|---|"]
            lines += [_line(row) for row in rows]
        for title, key in (("Failed", "failed"), ("Left out", "left_out")):
            if part[key]:
                lines += ["", f"{title}:", "", *(f"- {' '.join(text.split())}" for text in part[key])]
    return "\n".join([*lines, ""])


def _line(row: dict[str, Any]) -> str:
    most = row["aim"] if row["limit"] is None else row["limit"]
    words = "" if most is None else amount(most, row["unit"]) + (" (aim)" if row["limit"] is None else "")
    verdict = "**wrong**" if row["wrong"] else "missed" if row["aim"] is not None and row["value"] > row["aim"] else ""
    note = "; ".join(text for text in (verdict, _cell(row["note"])) if text)
    return f"| {_cell(row['what'])} | {_cell(row['size'])} | {amount(row['value'], row['unit'])} | {words} | {note} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def amount(value: float, unit: str) -> str:
    """Return a figure with its unit, in few digits."""
    if unit == "s":
        return clock(value)
    text = f"{value:.{MOST_DIGITS}g}"
    return f"{text} {unit}".strip()


def wrong_rows(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for every figure that is beyond its limit."""
    return [
        f"{row['what']}, {row['size']}: {amount(row['value'], row['unit'])}, expected at most "
        f"{amount(row['limit'], row['unit'])}"
        for part in parts for row in part["rows"] if row["wrong"]
    ]
