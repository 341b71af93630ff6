"""The things of the world: how each is called, looks, moves and sounds.

``CLASSES`` are what the built-in model is trained on. ``UNSEEN`` are kept from it, to be taught by an adapter: they
move as the others do, so their timing can be followed, but look and sound new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selva.utils.errors import UserError
from toyworld import looks, sound
from toyworld.paint import Colour

_METALS: dict[str, Colour] = {"golden": (222, 178, 62), "silver": (196, 202, 210), "copper": (196, 112, 70)}
_PLASTICS: dict[str, Colour] = {
    "red": (214, 56, 48), "blue": (58, 98, 214), "green": (52, 168, 84), "yellow": (238, 202, 60),
    "orange": (238, 134, 44), "purple": (142, 74, 184),
}


@dataclass(frozen=True)
class SoundClass:
    """One kind of thing.

    Attributes:
        name: what it is called in scenes and file names.
        description: one line for a listing.
        prompts: wordings; ``{colour}`` stands for the colour of the thing.
        colours: colour names and values.
        sound: of one impact or, for a running source, of the whole clip; see :mod:`toyworld.sound`.
        level: brings the classes to the same loudness.
        look, still: see :mod:`toyworld.looks`.
        running: starts and stops instead of being struck.
        min_gap_sec, most_events: of its impacts in 8 s.
    """

    name: str
    description: str
    prompts: tuple[str, ...]
    colours: dict[str, Colour]
    sound: Callable
    level: float
    look: Callable
    still: Callable = looks.nothing_still
    running: bool = False
    min_gap_sec: float = 0.27
    most_events: int = 12


def _pick(colours: dict[str, Colour], *names: str) -> dict[str, Colour]:
    return {name: colours[name] for name in names}


_TRAINED = (
    SoundClass(
        "wood", "a mallet knocks on a wooden block",
        ("a wooden block is struck", "a mallet knocks on a wooden block", "knocking on wood", "dry wooden knocks",
         "someone hits a {colour} block of wood", "wood block", "the knock of a wooden block"),
        {"brown": (160, 104, 58), "dark brown": (112, 70, 40), "pale": (206, 164, 108)},
        sound.wood, 0.75, looks.wood,
    ),
    SoundClass(
        "bell", "a hammer rings a metal bell",
        ("a metal bell is struck", "a bell rings", "ringing of a {colour} bell", "a hammer hits a bell",
         "bright metallic bell strokes", "bell", "the sound of a small bell"),
        _METALS, sound.bell, 0.55, looks.bell, looks.bell_still, min_gap_sec=0.32, most_events=10,
    ),
    SoundClass(
        "drum", "a stick beats a drum",
        ("a drum is beaten", "someone plays a {colour} drum", "drum beats", "low thumps of a drum",
         "a stick hits a drum", "drum", "the sound of a drum"),
        _pick(_PLASTICS, "red", "blue", "green", "purple"), sound.drum, 0.8, looks.drum,
    ),
    SoundClass(
        "ball", "a rubber ball bounces on the floor",
        ("a rubber ball bounces", "a {colour} ball bouncing", "bouncing ball", "a ball hits the floor",
         "rubber ball bouncing on the floor", "the thuds of a bouncing ball", "a ball is dropped and bounces"),
        _PLASTICS, sound.ball, 0.8, looks.ball, looks.ball_still, min_gap_sec=0.38, most_events=11,
    ),
    SoundClass(
        "glass", "a spoon taps a drinking glass",
        ("a spoon taps a glass", "glass clinks", "clinking of a {colour} glass", "a drinking glass is tapped",
         "high clear clinks of glass", "glass", "the clink of a glass"),
        {"clear": (150, 200, 215), "green": (90, 185, 130), "pink": (226, 130, 160)},
        sound.glass, 0.7, looks.glass,
    ),
    SoundClass(
        "water", "a tap drips into a basin",
        ("water drips into a basin", "a dripping tap", "water drops", "drops fall into water",
         "a drop of water splashes", "dripping water", "the plop of water drops in a {colour} basin"),
        {"white": (226, 228, 230), "grey": (150, 156, 162), "blue": (70, 110, 170)},
        sound.drop, 0.85, looks.water, looks.water_still, min_gap_sec=0.34, most_events=10,
    ),
    SoundClass(
        "shaker", "a maraca is shaken",
        ("a maraca is shaken", "someone shakes a {colour} maraca", "shaker", "rattling of a maraca",
         "short bursts of a shaker", "maraca", "the rattle of seeds in a shaker"),
        _pick(_PLASTICS, "red", "green", "yellow", "orange"), sound.shaker, 0.8, looks.shaker,
    ),
    SoundClass(
        "rain", "a cloud from which it rains",
        ("it rains", "rain falls from a cloud", "rain", "rain showers", "the sound of falling rain",
         "heavy rain that starts and stops", "a {colour} cloud with rain"),
        {"white": (240, 242, 246), "grey": (196, 202, 212), "pale blue": (205, 222, 240)},
        sound.rain, 0.9, looks.rain, running=True,
    ),
    SoundClass(
        "motor", "an electric fan runs",
        ("a fan runs", "an electric motor hums", "humming of a {colour} fan", "motor hum",
         "a fan is switched on and off", "fan", "the low hum of a fan"),
        _pick(_PLASTICS, "blue", "green", "orange", "purple"), sound.motor, 0.65, looks.motor, looks.motor_still,
        running=True,
    ),
    SoundClass(
        "siren", "a warning lamp with a siren",
        ("a siren wails", "a siren with a {colour} light", "siren", "an alarm with a turning light",
         "wailing of a siren", "a warning siren", "the rising and falling tone of an alarm"),
        _pick(_PLASTICS, "red", "blue", "orange"), sound.siren, 0.65, looks.siren, looks.siren_still, running=True,
    ),
)

_KEPT_AWAY = (
    SoundClass(
        "gong", "a mallet strikes a large gong",
        ("a gong is struck", "a {colour} gong", "gong", "deep strokes of a gong", "a mallet hits a large gong",
         "the sound of a gong", "a gong resounds"),
        {"bronze": (176, 128, 58), "golden": (214, 170, 70), "dark": (122, 92, 56)},
        sound.gong, 0.6, looks.gong, looks.gong_still, min_gap_sec=0.6, most_events=7,
    ),
    SoundClass(
        "bird", "a bird on a branch chirps",
        ("a bird chirps", "a {colour} bird sings", "bird", "chirping of a small bird", "tweets of a bird",
         "the sound of a bird", "birdsong"),
        _pick(_PLASTICS, "red", "blue", "yellow", "green"), sound.chirp, 0.7, looks.bird, looks.bird_still,
        min_gap_sec=0.36, most_events=10,
    ),
    SoundClass(
        "laser", "a toy ray gun fires",
        ("a laser zaps", "a ray gun fires", "laser", "zaps of a {colour} ray gun", "a toy laser is fired",
         "the sound of a laser", "science fiction laser shots"),
        _pick(_PLASTICS, "red", "blue", "purple", "orange"), sound.laser, 0.6, looks.laser, looks.laser_still,
        min_gap_sec=0.42, most_events=9,
    ),
    SoundClass(
        "violin", "a bow plays long notes on a violin",
        ("a violin plays", "a bow is drawn over a {colour} violin", "violin", "long notes of a violin",
         "someone bows a violin", "the sound of a violin", "a fiddle is played"),
        {"brown": (150, 84, 44), "amber": (196, 122, 52), "dark": (96, 54, 38)},
        sound.violin, 0.8, looks.violin, looks.violin_still, running=True,
    ),
    SoundClass(
        "gravel", "a boot steps on gravel",
        ("a boot steps on gravel", "footsteps on gravel", "gravel", "crunching of gravel under a {colour} boot",
         "someone walks over pebbles", "crunchy steps", "the sound of steps on gravel"),
        {"brown": (140, 92, 56), "black": (62, 60, 64), "red": (190, 60, 52)},
        sound.gravel, 0.8, looks.gravel, looks.gravel_still, min_gap_sec=0.55, most_events=8,
    ),
)

CLASSES: dict[str, SoundClass] = {kind.name: kind for kind in _TRAINED}
UNSEEN: dict[str, SoundClass] = {kind.name: kind for kind in _KEPT_AWAY}


def get_class(name: str) -> SoundClass:
    """Return the class of that name, trained or unseen.

    Raises:
        ValueError: no such class; the message lists all names.
    """
    if name in CLASSES:
        return CLASSES[name]
    if name in UNSEEN:
        return UNSEEN[name]
    raise UserError(f"unknown sound {name!r}, expected one of {', '.join([*CLASSES, *UNSEEN])}")
