"""A procedural world: seeded scenes of simple things that are struck, bounce, turn or flow, with the sound of it.

    classes.py   CLASSES and UNSEEN: the things there are, with their names and prompts
    motion.py    events, and the movements around them
    looks.py     pictures of the things; paint.py: shapes, backdrop.py: wall, floor and clutter behind them
    sound.py     sounds of the things; random_sound for training codecs
    scene.py     make_scene, Scene: things before a backdrop, with pictures, sound and events
    judging.py   events heard in a sound, and a classifier of sounds, both without any model
    measure.py   scores of a model: scenes -> generated sounds -> timing and class
    training/    training of tiny_16k from scratch

The built-in model ``tiny_16k`` is trained on it, and its ground truth (which object sounds when) measures that model.
"""

from __future__ import annotations

from toyworld.classes import CLASSES, UNSEEN, SoundClass, get_class
from toyworld.motion import Event
from toyworld.scene import Scene, Thing, make_scene
from toyworld.sound import random_sound

__all__ = ["CLASSES", "UNSEEN", "Event", "Scene", "SoundClass", "Thing", "get_class", "make_scene", "random_sound"]
