"""The vocabulary of the embedded models: 10 things, 6 colours, 3 backgrounds, 4 ways to say them (720 captions)."""

from __future__ import annotations

import random
from itertools import product

THINGS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
COLOURS = {
    "red": (200, 30, 40),
    "orange": (240, 130, 20),
    "yellow": (235, 205, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 200),
    "purple": (130, 50, 170),
}
BACKGROUNDS = {"white": 245, "grey": 128, "black": 12}
TEMPLATES = (
    "a photo of a {colour} {thing} on a {background} background",
    "a {colour} {thing} on {background}",
    "{colour} {thing}, {background} background",
    "a {colour} {thing}",
)
N_MEANINGS = len(THINGS) * len(COLOURS) * len(BACKGROUNDS)  # 180


def meaning(thing: int, colour: int, background: int) -> int:
    """Index 0..179 of a (thing, colour, background); also the class label of `tiny-pixel`."""
    return (thing * len(COLOURS) + colour) * len(BACKGROUNDS) + background


def parts(index: int) -> tuple[int, int, int]:
    """Inverse of `meaning`: (thing, colour, background)."""
    rest, background = divmod(index, len(BACKGROUNDS))
    return (*divmod(rest, len(COLOURS)), background)


def caption(index: int, template: int) -> str:
    """Caption of a meaning. The last template does not name the background: it fits three meanings."""
    thing, colour, background = parts(index)
    return TEMPLATES[template].format(
        thing=THINGS[thing], colour=list(COLOURS)[colour], background=list(BACKGROUNDS)[background]
    )


def all_captions() -> list[str]:
    """All 720, row `meaning * 4 + template`."""
    return [caption(m, t) for m, t in product(range(N_MEANINGS), range(len(TEMPLATES)))]


def draw(n: int, seed: int, templates: tuple[int, ...] = (0, 1, 2)) -> list[tuple[int, int]]:
    """n pairs (meaning, template), drawn by `random.Random(seed)`; by default only captions that name the background,
    so that the right answer is known."""
    rng = random.Random(seed)
    return [(rng.randrange(N_MEANINGS), rng.choice(templates)) for _ in range(n)]
