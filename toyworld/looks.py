"""The looks of the things of the world, at rest and in motion.

A look has two functions. ``still(canvas, thing)`` paints what never moves, once for a clip;
``moving(canvas, thing, now)`` the rest, for every picture. A thing stands on the ground at ``thing.x``,
``thing.ground`` and reaches about one ``thing.reach`` to both sides and twice that upwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from toyworld.paint import Canvas, Colour, darker, mixed

STEEL, DARK, WHITE, WOOD = (150, 156, 165), (58, 58, 66), (245, 245, 240), (150, 105, 62)
SPARK: Colour = (255, 250, 205)
SWING_ANGLE = 0.95  # radians that a striker is raised


@dataclass(frozen=True)
class Now:
    """The state of a thing at one moment, see the curves of :mod:`toyworld.motion`.

    Attributes:
        lift: how far a striker is raised, 0 at an impact.
        glow: fresh after an impact, dying away.
        sway: swinging of what hangs.
        gate: level of a running source. turns: revolutions it has done.
        height: of a ball over the floor, in picture heights.
        to_next: seconds until the next impact, infinity after the last. since: seconds after the latest one.
        time_sec: of the picture.
    """

    lift: float = 1.0
    glow: float = 0.0
    sway: float = 0.0
    gate: float = 0.0
    turns: float = 0.0
    height: float = 0.0
    to_next: float = math.inf
    since: float = math.inf
    time_sec: float = 0.0


def _striker(
    canvas: Canvas, at: tuple[float, float], pivot: tuple[float, float], lift: float, width: float,
    head: float, stick: Colour, tip: Colour, turn: float = 1.0,
) -> None:
    """Paint a stick that hits ``at`` when ``lift`` is 0 and otherwise is turned away about ``pivot``."""
    angle = turn * SWING_ANGLE * lift
    dx, dy = at[0] - pivot[0], at[1] - pivot[1]
    x = pivot[0] + dx * math.cos(angle) - dy * math.sin(angle)
    y = pivot[1] + dx * math.sin(angle) + dy * math.cos(angle)
    canvas.line(*pivot, x, y, width, stick)
    canvas.disc(x, y, head, colour=tip)


def _spark(canvas: Canvas, x: float, y: float, radius: float, glow: float) -> None:
    """Paint the flash of an impact."""
    if glow < 0.06:
        return
    canvas.disc(x, y, radius * (1.3 - 0.6 * glow), colour=SPARK, alpha=min(1.0, 1.1 * glow), shade=0)
    for k in range(6):
        angle = math.pi / 6 + k * math.pi / 3
        inner, outer = radius * (1.5 - 0.5 * glow), radius * (2.3 - 0.8 * glow)
        cos, sin = math.cos(angle), math.sin(angle)
        canvas.line(x + inner * cos, y + inner * sin, x + outer * cos, y + outer * sin, 0.013, SPARK,
                    min(1.0, 1.3 * glow))


def shadow(canvas: Canvas, thing: Any, width: float = 1.0, alpha: float = 0.3) -> None:
    """Paint the soft shadow of a thing on the ground."""
    for k in (1.15, 1.0, 0.8):
        canvas.disc(thing.x, thing.ground + 0.01, k * width * thing.reach, 0.16 * k * width * thing.reach,
                    colour=(30, 28, 30), alpha=alpha / 2.4, shade=0)


def nothing_still(canvas: Canvas, thing: Any) -> None:
    shadow(canvas, thing)


# -- things that are struck --------------------------------------------------------------------------------------------


def wood(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a block on two feet and a mallet from the right."""
    x, s = thing.x, thing.reach
    y = thing.ground - 0.52 * s + 0.06 * s * now.glow
    for side in (-0.6, 0.6):
        canvas.box(x + side * s, thing.ground - 0.08 * s, 0.14 * s, 0.1 * s, DARK)
    canvas.box(x, y, 0.95 * s, 0.36 * s, thing.rgb)
    for k in (-0.45, 0.05, 0.5):
        canvas.line(x - 0.75 * s, y + 0.36 * s * k, x + 0.75 * s, y + 0.36 * s * k * 0.8, 0.02 * s + 0.003,
                    darker(thing.rgb, 0.25))
    top = y - 0.36 * s
    _spark(canvas, x, top - 0.04, 0.30 * s, now.glow)
    _striker(canvas, (x, top - 0.09 * s), (x + 1.25 * s, top - 0.75 * s), now.lift, 0.09 * s, 0.16 * s, WOOD,
             (222, 184, 120))


def bell_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing)
    canvas.box(x, g - 0.04 * s, 0.9 * s, 0.06 * s, DARK)
    canvas.line(x + 0.8 * s, g, x + 0.8 * s, g - 2.0 * s, 0.09 * s, DARK)
    canvas.line(x + 0.84 * s, g - 2.0 * s, x - 0.1 * s, g - 2.0 * s, 0.09 * s, DARK)


def bell(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a bell that hangs from a post and swings when the hammer at its left hits it."""
    x, s, g = thing.x, thing.reach, thing.ground
    top, angle = g - 1.95 * s, -0.16 * now.sway
    cos, sin = math.cos(angle), math.sin(angle)

    def at(u: float, v: float) -> tuple[float, float]:
        return x + u * s * cos - v * s * sin, top + u * s * sin + v * s * cos

    rgb = mixed(thing.rgb, SPARK, 0.5 * now.glow)
    canvas.disc(*at(0, 1.38), 0.13 * s, colour=darker(thing.rgb, 0.5))
    canvas.polygon([at(-0.30, 0.25), at(0.30, 0.25), at(0.48, 0.80), at(0.60, 1.30), at(-0.60, 1.30), at(-0.48, 0.80)],
                   rgb)
    canvas.disc(*at(0, 0.28), 0.30 * s, colour=rgb)
    canvas.line(*at(-0.60, 1.28), *at(0.60, 1.28), 0.09 * s, darker(thing.rgb, 0.25))
    canvas.line(*at(0, 0), *at(0, 0.1), 0.08 * s, DARK)
    _spark(canvas, x - 0.62 * s, g - 0.75 * s, 0.26 * s, now.glow)
    _striker(canvas, (x - 0.62 * s, g - 0.75 * s), (x - 1.0 * s, g - 0.05 * s), now.lift, 0.08 * s, 0.15 * s, STEEL,
             STEEL, turn=-1.0)


def drum(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a drum seen a little from above, its skin dented by the stick from the left."""
    x, s, g = thing.x, thing.reach, thing.ground
    top = g - 0.95 * s
    canvas.disc(x, g - 0.12 * s, 0.95 * s, 0.26 * s, colour=darker(thing.rgb, 0.4))
    canvas.box(x, g - 0.53 * s, 0.95 * s, 0.42 * s, thing.rgb, radius=0.0)
    for k in (-0.75, -0.38, 0.0, 0.38, 0.75):
        canvas.line(x + k * s, top + 0.22 * s, x + k * s, g - 0.12 * s, 0.045 * s, WHITE)
    canvas.disc(x, top, 0.98 * s, 0.30 * s, colour=darker(thing.rgb, 0.4))
    canvas.disc(x, top, 0.90 * s, 0.25 * s, colour=mixed((232, 222, 205), SPARK, now.glow), shade=0.1)
    if now.glow > 0.05:
        canvas.ring(x, top, 0.9 * s * (1 - 0.7 * now.glow), 0.25 * s * (1 - 0.7 * now.glow), 0.03 * s + 0.004,
                    (120, 105, 90), now.glow)
    _spark(canvas, x, top - 0.1 * s, 0.30 * s, now.glow)
    _striker(canvas, (x, top - 0.05 * s), (x - 1.2 * s, top - 0.75 * s), now.lift, 0.08 * s, 0.13 * s, WOOD,
             (235, 225, 205), turn=-1.0)


def ball_still(canvas: Canvas, thing: Any) -> None:
    canvas.disc(thing.x, thing.ground + 0.01, 0.95 * thing.reach, 0.14 * thing.reach, colour=(30, 28, 30), alpha=0.15,
                shade=0)


def ball(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a rubber ball that falls, is flattened by the floor and jumps again."""
    x, g, r = thing.x, thing.ground, 0.62 * thing.reach
    close = max(0.0, 1 - 3 * now.height)
    canvas.disc(x, g + 0.01, r * (0.6 + 0.4 * close), 0.18 * r, colour=(25, 22, 25), alpha=0.15 + 0.3 * close, shade=0)
    flat = 1 - 0.35 * now.glow * close
    ry = r * flat
    _spark(canvas, x, g, 0.5 * r, now.glow)
    y = g - ry - now.height
    canvas.disc(x, y, r / math.sqrt(flat), ry, colour=thing.rgb, shade=0.5)
    canvas.line(x - 0.8 * r, y + 0.1 * ry, x + 0.8 * r, y + 0.1 * ry, 0.16 * r, mixed(thing.rgb, WHITE, 0.75))
    canvas.disc(x - 0.32 * r, y - 0.4 * ry, 0.18 * r, colour=WHITE, alpha=0.6, shade=0)


def glass(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a tumbler of water and a spoon that taps its rim from the right."""
    x, s, g = thing.x, thing.reach, thing.ground
    top, level = g - 1.45 * s, g - 0.75 * s

    def side(y: float) -> float:
        return (0.42 + 0.2 * (g - y) / (1.45 * s)) * s

    shake = 0.03 * s * math.sin(50 * now.time_sec) * now.glow
    x += shake
    rgb = mixed(thing.rgb, SPARK, 0.5 * now.glow)
    canvas.polygon([(x - side(top), top), (x + side(top), top), (x + side(g), g), (x - side(g), g)], rgb, 0.35)
    canvas.polygon([(x - side(level), level), (x + side(level), level), (x + side(g) * 0.95, g - 0.06 * s),
                    (x - side(g) * 0.95, g - 0.06 * s)], thing.rgb, 0.75)
    canvas.disc(x, level, side(level), 0.09 * s, colour=mixed(thing.rgb, WHITE, 0.45), shade=0)
    canvas.ring(x, top, side(top), 0.10 * s, 0.035 * s + 0.003, mixed(rgb, WHITE, 0.6))
    for k in (-1, 1):
        canvas.line(x + k * side(top), top, x + k * side(g), g, 0.03 * s + 0.003, mixed(rgb, WHITE, 0.5))
    hit = (x + side(top) + 0.05 * s, top + 0.12 * s)
    _spark(canvas, *hit, 0.26 * s, now.glow)
    _striker(canvas, hit, (thing.x + 1.05 * s, g - 0.30 * s), now.lift, 0.06 * s, 0.12 * s, STEEL, (200, 205, 212))


WATER_FALL_SEC = 0.34


def water_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing)
    canvas.line(x + 0.95 * s, g, x + 0.95 * s, g - 2.55 * s, 0.13 * s, STEEL)
    canvas.line(x + 0.95 * s, g - 2.5 * s, x, g - 2.5 * s, 0.13 * s, STEEL)
    canvas.line(x, g - 2.5 * s, x, g - 2.35 * s, 0.15 * s, STEEL)
    canvas.box(x + 0.95 * s, g - 2.66 * s, 0.2 * s, 0.05 * s, (200, 70, 60))


def water(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a tap that drips into a basin; rings run over the water and drops jump up."""
    x, s, g = thing.x, thing.reach, thing.ground
    surface = g - 0.62 * s
    canvas.disc(x, g - 0.12 * s, 0.66 * s, 0.18 * s, colour=darker(thing.rgb, 0.5))
    canvas.polygon([(x - 0.92 * s, surface), (x + 0.92 * s, surface), (x + 0.66 * s, g - 0.1 * s),
                    (x - 0.66 * s, g - 0.1 * s)], darker(thing.rgb, 0.25))
    canvas.disc(x, surface, 0.92 * s, 0.24 * s, colour=darker(thing.rgb, 0.4))
    canvas.disc(x, surface, 0.84 * s, 0.20 * s, colour=mixed((95, 175, 235), WHITE, 0.5 * now.glow), shade=-0.2)
    if now.since < 0.6:
        for delay in (0.0, 0.12):
            run = (now.since - delay) / 0.6
            if 0 < run < 1:
                canvas.ring(x, surface, 0.84 * s * run, 0.20 * s * run, 0.03 * s + 0.003, WHITE, 1 - run)
    if now.since < 0.3:
        jump = 1 - (2 * now.since / 0.3 - 1) ** 2
        for k in (-0.5, -0.17, 0.17, 0.5):
            canvas.disc(x + k * s * (0.5 + now.since / 0.3), surface - (0.75 - abs(k) * 0.5) * s * jump, 0.07 * s,
                        colour=(190, 225, 250), shade=0)
    fall = max(0.0, 1 - now.to_next / WATER_FALL_SEC)
    hanging = min(1.0, max(0.0, 1.8 - now.to_next)) if not fall else 1.0
    y = g - 2.22 * s + (surface - g + 2.22 * s) * fall**2
    canvas.disc(x, y, (0.05 + 0.06 * hanging) * s, (0.05 + 0.10 * hanging) * s, colour=(110, 190, 245))


def shaker(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a maraca that is jerked downwards and stops dead."""
    x, s = thing.x, thing.reach
    y = thing.ground - 0.95 * s - 0.62 * s * now.lift
    tilt = 0.5 - 0.8 * now.lift
    ux, uy = math.sin(tilt), math.cos(tilt)
    canvas.line(x, y, x + 1.05 * s * ux, y + 1.05 * s * uy, 0.17 * s, WOOD)
    canvas.disc(x, y, 0.52 * s, 0.62 * s, colour=mixed(thing.rgb, SPARK, 0.45 * now.glow), angle=-tilt)
    canvas.line(x - 0.45 * s * uy, y + 0.45 * s * ux, x + 0.45 * s * uy, y - 0.45 * s * ux, 0.12 * s,
                mixed(thing.rgb, WHITE, 0.8))
    if now.glow > 0.06:
        for k in (-1, 1):
            for d in (0.0, 0.22):
                canvas.line(x + k * (0.68 + d) * s, y - 0.3 * s, x + k * (0.68 + d) * s, y + 0.3 * s, 0.011, SPARK,
                            now.glow)


# -- running sources ---------------------------------------------------------------------------------------------------


def rain(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a cloud that darkens when it rains; more streaks for heavier rain."""
    x, s, g = thing.x, thing.reach, thing.ground
    cloud_y = g - 2.2 * s
    drops = round(26 * now.gate)
    for k in range(drops):
        u, v = (k * 0.754878) % 1.0, (k * 0.569840) % 1.0  # Roberts' R2 sequence: evenly scattered, never in lines
        fall = (now.time_sec * 2.2 + v) % 1.0
        px, y = x + (1.7 * u - 0.85) * s, cloud_y + fall * (g - cloud_y)
        canvas.line(px, y, px - 0.02 * s, min(y + 0.24 * s, g), 0.03 * s + 0.004, (150, 200, 250), 0.9)
    if now.gate:
        canvas.disc(x, g + 0.01, 0.95 * s, 0.13 * s, colour=(120, 170, 215), alpha=0.7 * min(1, now.gate))
    rgb = mixed(thing.rgb, (92, 98, 118), 0.85 * min(1, now.gate))
    for dx, dy, r in ((-0.5, 0.05, 0.38), (0.5, 0.05, 0.4), (0, -0.15, 0.52), (0.05, 0.14, 0.45)):
        canvas.disc(x + dx * s, cloud_y + dy * s, r * 1.15 * s, r * s, colour=rgb, shade=0.3)


def motor_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing, 0.7)
    canvas.disc(x, g - 0.05 * s, 0.55 * s, 0.14 * s, colour=DARK)
    canvas.line(x, g - 0.08 * s, x, g - 1.2 * s, 0.14 * s, DARK)
    canvas.disc(x, g - 1.25 * s, 0.98 * s, colour=(215, 222, 226), alpha=0.5, shade=0.1)
    canvas.ring(x, g - 1.25 * s, 0.98 * s, 0.98 * s, 0.07 * s, STEEL)


def motor(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a fan with four blades, one of them lighter so that its speed can be seen, and a lamp that is lit by it."""
    x, s, y = thing.x, thing.reach, thing.ground - 1.25 * thing.reach
    for k in range(4):
        angle = 2 * math.pi * (now.turns + k / 4)
        rgb = mixed(thing.rgb, WHITE, 0.6) if k == 0 else thing.rgb
        canvas.disc(x + 0.48 * s * math.cos(angle), y + 0.48 * s * math.sin(angle), 0.42 * s, 0.19 * s, colour=rgb,
                    angle=angle + 0.3)
    canvas.disc(x, y, 0.17 * s, colour=DARK)
    on = min(1.0, 2 * now.gate)
    canvas.disc(x, thing.ground - 0.06 * s, 0.10 * s, colour=mixed((70, 40, 40), (120, 255, 120), on), shade=0)


def siren_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing)
    canvas.box(x, g - 0.28 * s, 0.85 * s, 0.26 * s, DARK)
    canvas.box(x, g - 0.6 * s, 0.65 * s, 0.09 * s, STEEL)


def siren(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a warning lamp whose beam turns round: to the left, towards us, to the right, away."""
    x, s, g = thing.x, thing.reach, thing.ground
    on = min(1.0, 1.6 * now.gate)
    y = g - 1.0 * s
    angle = 2 * math.pi * now.turns
    side, front = math.sin(angle), 0.5 - 0.5 * math.cos(angle)
    light = mixed(thing.rgb, WHITE, 0.55)
    if on and abs(side) > 0.08:
        end, half = x + 1.25 * s * side, 0.45 * s
        corners = [(x, y - 0.1 * s), (end, y - half), (end, y + half), (x, y + 0.1 * s)]
        canvas.polygon(corners if side > 0 else corners[::-1], light, 0.6 * on, shade=0)
    lit = mixed(darker(thing.rgb, 0.45), light, on * (0.5 + 0.5 * front))
    canvas.disc(x, y, 0.5 * s, 0.55 * s, colour=lit)
    canvas.box(x, g - 0.72 * s, 0.5 * s, 0.27 * s, lit)
    if on:
        canvas.disc(x, y, (0.25 + 0.5 * front) * s, colour=light, alpha=0.55 * on * front, shade=0)


# -- never used in training --------------------------------------------------------------------------------------------


def gong_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing)
    red = (120, 40, 40)
    for side in (-1, 1):
        canvas.line(x + side * 0.98 * s, g, x + side * 0.98 * s, g - 2.15 * s, 0.11 * s, red)
    canvas.line(x - 1.08 * s, g - 2.15 * s, x + 1.08 * s, g - 2.15 * s, 0.13 * s, red)


def gong(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a large disc in a red frame, which a padded mallet from below right sets swinging."""
    x, s, g = thing.x, thing.reach, thing.ground
    y, r = g - 1.2 * s, 0.78 * s
    narrow = 1 - 0.25 * abs(now.sway)
    for side in (-0.4, 0.4):
        canvas.line(x + side * s, g - 2.15 * s, x + side * r * narrow, y - 0.8 * r, 0.03 * s + 0.003, DARK)
    rgb = mixed(thing.rgb, SPARK, 0.5 * now.glow)
    canvas.disc(x, y, r * narrow, r, colour=rgb, shade=0.5)
    canvas.ring(x, y, 0.72 * r * narrow, 0.72 * r, 0.05 * s, darker(thing.rgb, 0.3))
    canvas.disc(x, y, 0.22 * r * narrow, 0.22 * r, colour=mixed(thing.rgb, WHITE, 0.4))
    _spark(canvas, x + 0.1 * s, y + 0.1 * s, 0.32 * s, now.glow)
    _striker(canvas, (x + 0.1 * s, y + 0.1 * s), (x + 1.05 * s, g - 0.1 * s), now.lift, 0.09 * s, 0.2 * s, WOOD,
             (205, 60, 60))


def bird_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    brown = (96, 70, 48)
    canvas.line(x - 0.9 * s, g, x - 0.9 * s, g - 0.75 * s, 0.16 * s, brown)
    canvas.line(x - 1.0 * s, g - 0.72 * s, x + 1.0 * s, g - 0.66 * s, 0.13 * s, brown)
    for dx in (-0.55, 0.75):
        canvas.disc(x + dx * s, g - 0.85 * s, 0.16 * s, 0.09 * s, colour=(90, 150, 70), angle=0.5)


def bird(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a small bird on a branch that ducks, and opens its beak for every tweet."""
    x, s = thing.x, thing.reach
    feet = thing.ground - 0.7 * s
    y = feet - 0.48 * s - 0.22 * s * now.lift
    dark = darker(thing.rgb, 0.35)
    for dx in (-0.08, 0.1):
        canvas.line(x + dx * s, feet, x + dx * s, y, 0.035 * s + 0.003, (210, 130, 50))
    canvas.polygon([(x - 0.95 * s, y - 0.1 * s), (x - 0.3 * s, y - 0.15 * s), (x - 0.3 * s, y + 0.15 * s)], dark)
    canvas.disc(x, y, 0.52 * s, 0.38 * s, colour=thing.rgb, angle=-0.25)
    canvas.disc(x - 0.1 * s, y + 0.02 * s, 0.32 * s, 0.18 * s, colour=dark, angle=0.3 - 0.6 * now.lift)
    hx, hy = x + 0.42 * s, y - 0.38 * s + 0.10 * s * (1 - now.lift)
    gape = 0.22 * s * now.glow
    canvas.polygon([(hx + 0.2 * s, hy - 0.08 * s), (hx + 0.58 * s, hy - gape), (hx + 0.2 * s, hy + 0.04 * s)],
                   (240, 165, 40))
    canvas.polygon([(hx + 0.2 * s, hy), (hx + 0.54 * s, hy + 0.06 * s + gape), (hx + 0.2 * s, hy + 0.12 * s)],
                   (225, 140, 30))
    canvas.disc(hx, hy, 0.28 * s, colour=thing.rgb)
    canvas.disc(hx + 0.1 * s, hy - 0.06 * s, 0.055 * s, colour=(20, 20, 20), shade=0)
    if now.glow > 0.06:
        for k in (-0.5, 0.0, 0.5):
            x0, y0 = hx + 0.68 * s, hy + 0.3 * s * k
            canvas.line(x0, y0, x0 + 0.2 * s * math.cos(k), y0 + 0.2 * s * math.sin(k), 0.011, SPARK, now.glow)


def laser_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing)
    for dx in (-0.6, 0.0, 0.6):
        canvas.line(x + dx * s, g, x - 0.1 * s, g - 0.85 * s, 0.08 * s, DARK)


def laser(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a ray gun on a tripod that dips, fires a bolt and recoils."""
    x, s = thing.x - 0.1 * thing.reach, thing.reach
    y = thing.ground - 0.95 * s
    tilt = -0.25 - 0.55 * now.lift
    cos, sin = math.cos(tilt), math.sin(tilt)

    def at(u: float, v: float) -> tuple[float, float]:
        return x + s * (u * cos - v * sin), y + s * (u * sin + v * cos)

    bolt = (120, 255, 170)
    if now.since < 0.2:
        u = 0.75 + 4.0 * now.since
        canvas.line(*at(u, -0.1), *at(u + 0.35, -0.1), 0.11 * s, bolt)
        canvas.line(*at(u, -0.1), *at(u + 0.35, -0.1), 0.05 * s, WHITE)
    canvas.polygon([at(-0.45, 0.05), at(-0.15, 0.05), at(-0.2, 0.5), at(-0.5, 0.5)], darker(thing.rgb, 0.45))
    canvas.line(*at(-0.5, -0.1), *at(0.3, -0.1), 0.38 * s, thing.rgb, shade=0.35)
    canvas.line(*at(0.3, -0.1), *at(0.7, -0.1), 0.13 * s, STEEL)
    for u in (0.4, 0.55):
        canvas.line(*at(u, -0.25), *at(u, 0.05), 0.06 * s, mixed(thing.rgb, WHITE, 0.5))
    canvas.disc(*at(-0.25, -0.1), 0.1 * s, colour=mixed(darker(bolt, 0.5), bolt, now.glow), shade=0)
    _spark(canvas, *at(0.8, -0.1), 0.30 * s, now.glow)


def violin_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing, 0.8)
    rgb = thing.rgb
    canvas.line(x, g - 1.1 * s, x, g - 2.35 * s, 0.13 * s, darker(rgb, 0.6))
    canvas.disc(x, g - 2.4 * s, 0.11 * s, colour=darker(rgb, 0.4))
    canvas.disc(x, g - 0.55 * s, 0.62 * s, 0.52 * s, colour=rgb, shade=0.45)
    canvas.disc(x, g - 1.25 * s, 0.47 * s, 0.40 * s, colour=rgb, shade=0.45)
    canvas.box(x, g - 0.92 * s, 0.36 * s, 0.22 * s, rgb)
    for side in (-1, 1):
        canvas.line(x + 0.24 * s * side, g - 0.75 * s, x + 0.18 * s * side, g - 1.1 * s, 0.04 * s, darker(rgb, 0.7))


def violin(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint the bow of a violin, lifted off while it is silent, and its strings, which shake while it is played."""
    x, s, g = thing.x, thing.reach, thing.ground
    on = min(1.0, 1.6 * now.gate)
    shake = 0.03 * s * on * math.sin(60 * now.time_sec)
    for k in (-0.06, 0.0, 0.06):
        canvas.line(x + k * s, g - 0.35 * s, x + k * s + shake, g - 0.95 * s, 0.02 * s + 0.003, mixed(DARK, SPARK, on))
        canvas.line(x + k * s + shake, g - 0.95 * s, x + k * s, g - 2.3 * s, 0.02 * s + 0.003, mixed(DARK, SPARK, on))
    y = g - 0.95 * s - 0.45 * s * (1 - on)
    middle = x + 0.55 * s * math.sin(2 * math.pi * now.turns)
    canvas.line(middle - 0.95 * s, y + 0.12 * s, middle + 0.95 * s, y - 0.12 * s, 0.05 * s + 0.003, WHITE)
    canvas.line(middle - 0.95 * s, y + 0.02 * s, middle + 0.95 * s, y - 0.26 * s, 0.06 * s + 0.003, (120, 50, 30))
    canvas.box(middle + 0.88 * s, y - 0.15 * s, 0.12 * s, 0.09 * s, (45, 28, 22))
    if on:
        for side in (-1, 1):
            for k in (0.85, 1.05):
                canvas.line(x + side * k * s, g - 1.55 * s, x + side * (k + 0.05) * s, g - 1.95 * s, 0.012, SPARK, on)


_PEBBLES = tuple(((k * 0.754878) % 1.0, (k * 0.569840) % 1.0) for k in range(1, 27))  # Roberts' R2 sequence


def gravel_still(canvas: Canvas, thing: Any) -> None:
    x, s, g = thing.x, thing.reach, thing.ground
    shadow(canvas, thing, 1.1)
    for u, v in _PEBBLES:
        grey = 110 + 90 * ((7 * u + 3 * v) % 1.0)
        canvas.disc(x + (2.2 * u - 1.1) * s, g + (0.16 * v - 0.10) * s, (0.09 + 0.05 * v) * s, 0.07 * s,
                    colour=(grey, grey - 6, grey - 16))


def gravel(canvas: Canvas, thing: Any, now: Now) -> None:
    """Paint a boot that comes down on pebbles, some of which jump away from it."""
    x, s, g = thing.x, thing.reach, thing.ground
    y = g - 0.10 * s - 0.75 * s * now.lift
    dark = darker(thing.rgb, 0.35)
    canvas.line(x - 0.22 * s, y - 0.35 * s, x - 0.22 * s, y - 1.45 * s, 0.46 * s, (70, 90, 140))
    canvas.box(x - 0.22 * s, y - 0.55 * s, 0.30 * s, 0.38 * s, thing.rgb)
    canvas.disc(x + 0.12 * s, y - 0.20 * s, 0.58 * s, 0.22 * s, colour=thing.rgb)
    canvas.box(x + 0.08 * s, y - 0.03 * s, 0.64 * s, 0.07 * s, dark)
    if now.since < 0.35:
        jump = 1 - (2 * now.since / 0.35 - 1) ** 2
        for k in (-1.0, -0.7, 0.75, 1.05):
            canvas.disc(x + k * s * (0.75 + now.since), g - (0.75 - 0.3 * abs(k)) * s * jump - 0.05 * s, 0.09 * s,
                        colour=(200, 195, 180), shade=0)
    if now.glow > 0.06:
        _spark(canvas, x + 0.62 * s, g - 0.05 * s, 0.26 * s, now.glow)
