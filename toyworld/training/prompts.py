"""Prompts for training the text encoders: the world's wordings, words that name nothing, and no words at all.

An adapter teaches words that the encoders never met. They learn to keep such words apart from the known ones, and from
each other, because sentences about made-up things are among what they are trained on.
"""

from __future__ import annotations

import numpy as np

from toyworld import Scene

TEMPLATES = (
    "{}", "a {}", "the sound of a {}", "a {} is struck", "a {} is heard", "someone plays a {}", "{} sounds",
    "the {} is hit again and again", "a {colour} {}", "noises of a {}", "a {} in a room", "a loud {colour} {}",
)
COLOURS = ("red", "blue", "green", "grey", "white", "dark", "orange", "pale")
ANYTHING = ("", "sound", "something", "a sound", "all sounds", "everything that is heard", "noise")
_STARTS = ("b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu", "r",
           "s", "sh", "sk", "st", "t", "th", "tr", "v", "w", "y", "z")
_MIDDLES = ("a", "e", "i", "o", "u", "ai", "ea", "ee", "oa", "oo", "ou", "ir", "or")
_ENDS = ("", "b", "ck", "d", "ff", "g", "l", "ll", "m", "n", "nd", "ng", "nk", "p", "r", "rd", "s", "sh", "ss", "st",
         "t", "x", "er", "le", "y")


def made_up_word(rng: np.random.Generator) -> str:
    """Return one or two syllables that name nothing the model knows."""
    return "".join(
        str(rng.choice(part)) for _ in range(rng.integers(1, 3)) for part in (_STARTS, _MIDDLES, _ENDS)
    )


def sentence(rng: np.random.Generator, word: str) -> str:
    """Return a sentence about the thing called ``word``."""
    return str(rng.choice(TEMPLATES)).replace("{colour}", str(rng.choice(COLOURS))).format(word)


def vary(rng: np.random.Generator, prompt: str) -> str:
    """Return the prompt as people may also type it: with a capital, a full stop, words around it."""
    draw = rng.random()
    if draw < 0.1:
        return prompt.capitalize() + "."
    if draw < 0.2:
        return f"the sound of {prompt}" if not prompt.startswith("the sound") else prompt
    if draw < 0.25:
        return f"{prompt}, {rng.choice(['close', 'loud', 'clear', 'in a room', 'recorded well'])}"
    return prompt


def prompts_for(scene: Scene, rng: np.random.Generator) -> list[tuple[str, list[int]]]:
    """Return two prompts, each with the objects whose sound it asks for; of two objects, mostly one each."""
    first = _prompt_for(scene, rng)
    if len(scene.objects) == 2 and len(first[1]) == 1:
        return [first, _naming(scene, rng, 1 - first[1][0])]
    return [first, _prompt_for(scene, rng)]


def _prompt_for(scene: Scene, rng: np.random.Generator) -> tuple[str, list[int]]:
    everything = list(range(len(scene.objects)))
    draw = rng.random()
    if draw < 0.08:
        return str(rng.choice(ANYTHING)), everything
    if draw < 0.3 and len(everything) == 1:
        return sentence(rng, made_up_word(rng)), everything  # what nobody knows, but there is only one thing to hear
    return _naming(scene, rng, int(rng.integers(len(everything))))


def _naming(scene: Scene, rng: np.random.Generator, index: int) -> tuple[str, list[int]]:
    return vary(rng, scene.prompt(rng, index)), [index]
