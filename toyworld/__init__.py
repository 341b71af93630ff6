"""A procedural world: seeded scenes of simple things that are struck, bounce, turn or flow, with the sound of it.

    classes.py    CLASSES and UNSEEN: what there is, how it is called       scene.py     make_scene, Scene
    motion.py     events and the movements around them                      looks.py     what things look like
    sound.py      what they sound like; random_sound for training codecs    paint.py, backdrop.py   pictures

The built-in model ``tiny_16k`` is trained on it, and its ground truth (which object sounds when) measures that model.
"""

from __future__ import annotations

from toyworld.classes import CLASSES, UNSEEN, SoundClass, get_class
from toyworld.motion import Event
from toyworld.scene import Scene, Thing, make_scene
from toyworld.sound import random_sound

__all__ = ["CLASSES", "UNSEEN", "Event", "Scene", "SoundClass", "Thing", "get_class", "make_scene", "random_sound"]
