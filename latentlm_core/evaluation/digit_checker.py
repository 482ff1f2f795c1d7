"""Whether an image of the data set ``coloured-digits`` shows what its caption says.

The checker looks at an image without knowing its caption, says what scene it shows, and only then
compares, so that a caption cannot talk it into seeing anything.

Notable choices:
- Colours and layout are computed. The ground is the median of the border; a digit has the colour to
  which its pixels lie nearest on a straight line from the ground; two digits stand side by side
  where the centres of the left and the right half are as far apart as halves are, else above
  each other.
- Only the shape is read by a network: what share of the digit's colour each pixel has, centred
  and at the size of single digits. It is trained on the train split of the data set, gone through
  the same recovery, apart from everything that it judges.
- What fits nothing has no name: a colour far from all colours, a digit of two colours, a striped
  ground. An empty half has no digit. Such a scene differs from that of every caption.
- 984 of the 1,000 test images are read as what their captions say (in the rest a digit is misread),
  and 2 of 4,186 captions with one word changed, or two digits exchanged, were accepted.

Axes: N images, H W image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from latentlm_core.data.base import Example, Image
from latentlm_core.data.coloured_digits import (
    DIGIT_NAMES,
    MAX_PAIR_SHIFT,
    RELATIONS,
    SIZE,
    ColouredDigitSource,
    Relation,
    Scene,
    parse_caption,
)
from latentlm_core.data.embedded import COLOURS
from latentlm_core.errors import ArtifactError, DataError
from latentlm_core.evaluation.classifier import ImageClassifier, predict, train_classifier
from latentlm_core.evaluation.image_sets import image_array
from latentlm_core.progress import SILENT, Progress

UNKNOWN = "unknown"
"""Name of a colour that is none of the six."""
NUM_STEPS = 1500
"""Of the classifier's training, a minute of one CPU core."""
DIGIT_SIZE = 28
"""Pixels of a single digit; those of a pair have half of the image."""
BORDER = 2
"""Pixels of the frame that tells the ground."""
COLOUR_TOLERANCE = 60.0
"""Half the distance of the two colours that are nearest to each other, blue and purple."""
MIN_GROUND = 0.7
"""Part of the frame that must have the colour of the ground."""
MIN_INK = 0.4
"""Share of its colour that the strongest pixels of a digit have at least."""
NUM_STRONGEST = 6
"""Pixels of a digit that tell how far its colour reaches."""
MAX_UNEXPLAINED = 0.1
"""Part of a digit's squared distance from the ground that may lie off its line."""
MAX_OFF = 4.0
"""Pixels by which the distance of two digits may differ from half the image."""

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reading:
    """What is right of an image.

    Attributes:
        digits: whether it has the digits of its caption.
        colours: whether they and the ground have their colours.
        positions: whether their number, their relation and their order are right.
        seen: what it shows; digits that are not there are left out.
    """

    digits: bool
    colours: bool
    positions: bool
    seen: Scene

    @property
    def is_right(self) -> bool:
        """Whether everything is."""
        return self.digits and self.colours and self.positions


class DigitChecker:
    """Reads coloured digits.

    Args:
        classifier: reads their shapes, as ``train`` makes it; it is used where it is.
    """

    def __init__(self, classifier: ImageClassifier) -> None:
        self.classifier = classifier

    @classmethod
    def train(
        cls, *, seed: int = 0, device: torch.device | str = "cpu", progress: Progress = SILENT
    ) -> Self:
        """Train one; the accuracy of its classifier on held-out digits is kept in its config.

        Raises:
            MissingExtraError: the digits' package is not installed.
            CorruptFileError: its file is not what it was.
        """
        train, test = (_RecoveredDigits(split, progress) for split in ("train", "test"))
        classifier = train_classifier(
            train,
            test,
            image_size=SIZE,
            seed=seed,
            num_steps=NUM_STEPS,
            device=device,
            progress=progress,
        )
        return cls(classifier)

    def save(self, folder: Path) -> None:
        """Write the classifier's weights and configuration."""
        self.classifier.save(folder)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Self:
        """Read what ``save`` wrote.

        Raises:
            ArtifactError: a file is missing, or the classifier does not read digits.
            LatentLMError: as ``ImageClassifier.load``.
        """
        classifier = ImageClassifier.load(folder)
        if classifier.config.classes != DIGIT_NAMES or classifier.config.image_size != SIZE:
            raise ArtifactError(f"The classifier in {folder} reads no coloured digits.")
        return cls(classifier.to(device))

    def see(self, images: Image) -> list[Scene]:
        """What images uint8 (N, 32, 32, 3) show.

        Raises:
            DataError: images of another type or size.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
            raise DataError(
                f"Coloured digits are uint8 images (N, {SIZE}, {SIZE}, 3), not "
                f"{images.dtype} {images.shape}."
            )
        layouts = [_look(image) for image in images]
        shapes = [shape for layout in layouts for shape in layout.shapes]
        if not shapes:
            return [layout.scene(()) for layout in layouts]
        stacked = np.repeat(np.stack(shapes)[..., None], 3, axis=3)
        digits = iter(predict(self.classifier, image_array(stacked, "digits")).tolist())
        return [layout.scene(tuple(next(digits) for _ in layout.shapes)) for layout in layouts]

    def read(self, images: Image, scenes: Sequence[Scene]) -> list[Reading]:
        """Compare images uint8 (N, 32, 32, 3) with the N scenes that they should show.

        Raises:
            DataError: images of another type or size, or another number of scenes.
        """
        if len(images) != len(scenes):
            raise DataError(f"{len(images)} images cannot show {len(scenes)} scenes.")
        return [_compare(seen, asked) for seen, asked in zip(self.see(images), scenes, strict=True)]

    def is_right(self, image: Image, caption: str) -> bool:
        """Whether an image uint8 (32, 32, 3) shows what its caption says.

        Raises:
            DataError: the image has another type or size, or the caption describes no scene.
        """
        scene = parse_caption(caption)
        if scene is None:
            raise DataError(f"{caption!r} describes no coloured digits.")
        return self.read(image[None], [scene])[0].is_right


@dataclass(frozen=True, slots=True)
class _Layout:
    """What can be computed of an image.

    Attributes:
        background: colour of the ground; None where it is black.
        relation: of two digits; None for one, and where they stand in no relation.
        colours: of the digits that are there.
        shapes: how much of its colour each pixel of a digit has, uint8 (H, W).
    """

    background: str | None
    relation: Relation | None
    colours: tuple[str, ...]
    shapes: tuple[npt.NDArray[np.uint8], ...]

    def scene(self, digits: tuple[int, ...]) -> Scene:
        pairs = tuple(zip(digits, self.colours, strict=True))
        return Scene(pairs, self.background, self.relation)


class _RecoveredDigits:
    """The shapes of the digits of a split, recovered from its images, as a source with classes."""

    classes = DIGIT_NAMES

    def __init__(self, split: str, progress: Progress) -> None:
        source = ColouredDigitSource(split)
        self.name = source.name
        self._examples: list[Example] = []
        with progress.bar(f"recovering digits of {split}", len(source), "images") as bar:
            for index in range(len(source)):
                self._examples.extend(_recover(source[index]))
                bar.advance()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def _recover(example: Example) -> Iterator[Example]:
    """The digits of an image in grey; none, where not all of them are found."""
    scene, layout = parse_caption(str(example.caption)), _look(example.image)
    if scene is not None and len(layout.shapes) == len(scene.digits):
        for (digit, _), shape in zip(scene.digits, layout.shapes, strict=True):
            yield Example(np.repeat(shape[..., None], 3, axis=2), digit, None, example.key)


def _look(image: Image) -> _Layout:
    """Compute everything but the digits of an image (H, W, 3)."""
    pixels = image.astype(np.float32)
    ground, background = _find_ground(pixels)
    if background is not None:
        relation, fields, size = None, [pixels], DIGIT_SIZE
    else:
        relation, halves = _split(pixels, ground)
        fields = [np.where(half[..., None], pixels, ground) for half in halves]
        size = SIZE // 2
    found = [_find_colour(field, ground) for field in fields]
    colours = tuple(colour for colour, _ in found if colour)
    shapes = tuple(_centre(ink, size) for colour, ink in found if colour)
    return _Layout(background, relation, colours, shapes)


def _find_ground(pixels: Floats) -> tuple[Floats, str | None]:
    """The colour around (3,), and its name; None for black."""
    inside = np.zeros((SIZE, SIZE), bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    frame = pixels[~inside]
    ground = np.median(frame, axis=0).astype(np.float32)
    share = (np.linalg.norm(frame - ground, axis=1) < COLOUR_TOLERANCE).mean()
    named = {name: np.linalg.norm(ground - value) for name, value in COLOURS.items()}
    near = min(named, key=named.__getitem__)
    distance, black = named[near], np.linalg.norm(ground)
    if share < MIN_GROUND or min(distance, black) > COLOUR_TOLERANCE:
        return ground, UNKNOWN
    return ground, None if black < distance else near


def _find_colour(pixels: Floats, ground: Floats) -> tuple[str, Floats]:
    """The colour of what is on the ground, and how much of it each pixel (H, W) has, 0 to 1.

    The name is "" where there is nothing.
    """
    offset = pixels.reshape(-1, 3) - ground
    is_inked = np.linalg.norm(offset, axis=1) > COLOUR_TOLERANCE
    axes = np.array(list(COLOURS.values()), np.float32) - ground
    lengths = np.maximum((axes**2).sum(1), 1.0)
    shares = np.clip(offset @ axes.T / lengths, 0.0, 1.0)
    off_line = ((offset[:, None] - shares[..., None] * axes) ** 2).sum(2)[is_inked].sum(0)
    strongest = np.argsort((offset**2).sum(1))[-NUM_STRONGEST:]
    off_end = ((offset[strongest].mean(0) - axes) ** 2).sum(1)
    is_other = lengths > COLOUR_TOLERANCE**2
    best = int(np.where(is_other, off_line + NUM_STRONGEST * off_end, np.inf).argmin())
    ink = shares[:, best].reshape(SIZE, SIZE)
    if is_inked.sum() < NUM_STRONGEST or shares[strongest, best].mean() < MIN_INK:
        return "", ink
    unexplained = off_line[best] / (offset[is_inked] ** 2).sum()
    return list(COLOURS)[best] if unexplained < MAX_UNEXPLAINED else UNKNOWN, ink


def _split(pixels: Floats, ground: Floats) -> tuple[Relation | None, tuple[Bools, Bools]]:
    """How two digits on one ground stand to each other, and where each of them may be (H, W).

    There is no relation where the halves' centres are not as far apart as digits are.
    """
    strength = np.linalg.norm(pixels - ground, axis=2)
    strength[strength < COLOUR_TOLERANCE] = 0.0
    rows, columns = np.indices((SIZE, SIZE))
    found: list[tuple[float, float, Relation, tuple[Bools, Bools]]] = []
    for relation, places, axis in zip(RELATIONS, (columns, rows), (1, 0), strict=True):
        halves = places < SIZE // 2, places >= SIZE // 2
        first, second = (_centre_of_mass(strength * half) for half in halves)
        apart, askew = float((second - first)[axis]), float((second - first)[1 - axis])
        found.append((abs(apart - SIZE // 2), abs(askew), relation, halves))
    off, askew, relation, halves = min(found, key=lambda item: item[0])
    is_placed = off <= MAX_OFF and askew <= 2 * MAX_PAIR_SHIFT + MAX_OFF
    return relation if is_placed else None, halves


def _centre(ink: Floats, size: int) -> npt.NDArray[np.uint8]:
    """A digit of ``size`` pixels, its centre of mass in the middle and enlarged to 28 pixels."""
    middle = np.round(_centre_of_mass(ink) + 0.5)
    scale = size / DIGIT_SIZE
    y, x = (2.0 * middle / SIZE - 1.0).tolist()
    theta = torch.tensor([[[scale, 0.0, x], [0.0, scale, y]]])
    grid = F.affine_grid(theta, [1, 1, SIZE, SIZE], align_corners=False)
    moved = F.grid_sample(torch.from_numpy(ink)[None, None], grid, "bicubic", align_corners=False)
    return (moved[0, 0].clamp(0.0, 1.0) * 255.0).round().byte().numpy()


def _centre_of_mass(weights: Floats) -> Floats:
    """Row and column (2,); the middle where there is no mass."""
    places = np.indices(weights.shape, np.float32).reshape(2, -1)
    mass = weights.reshape(-1)
    centre: Floats = places @ mass / mass.sum() if mass.any() else places.mean(1)
    return centre


def _compare(seen: Scene, asked: Scene) -> Reading:
    """Digits and colours are compared in order, or, where two were exchanged, in the other one."""
    is_exchanged = seen.digits != asked.digits and seen.digits == asked.digits[::-1]
    found = seen.digits[::-1] if is_exchanged else seen.digits
    digits, colours = ([item[place] for item in found] for place in (0, 1))
    return Reading(
        digits=digits == [digit for digit, _ in asked.digits],
        colours=colours == [colour for _, colour in asked.digits]
        and seen.background == asked.background,
        positions=not is_exchanged
        and len(found) == len(asked.digits)
        and seen.relation == asked.relation,
        seen=seen,
    )
