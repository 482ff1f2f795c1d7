"""A folder of samples, and what stands beside the images.

settings.json   what decides the samples: model, seed, sampler, classes
000000.png ...  the images, each written when it is whole
samples.jsonl   a row for each image: file, class, model, seed, settings
grid.png        the first of them together
samples.npz     on request, arr_0 and arr_1 as ADM has them
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentlm_core.data.media import image_grid, read_image, write_png
from latentlm_core.evaluation.npz import write_arrays
from latentlm_core.files import write_file, write_text
from latentlm_core.workflows.claimed_folder import UNCOMPARED, ClaimedFolder

MAX_GRID = 256
"""Samples that the grid shows at most."""


class SampleFolder(ClaimedFolder):
    """Images of one model, seed and setting; of other settings it takes none.

    Args:
        path: the folder.
        settings: JSON values that decide the samples.
        classes: names of the model's classes.
        labels: the classes that samples take in turn: sample i is of ``labels[i % len(labels)]``.
    """

    unit = "images"

    def __init__(
        self, path: Path, settings: dict[str, Any], classes: Sequence[str], labels: Sequence[int]
    ) -> None:
        super().__init__(path, settings)
        self._classes = classes
        self._labels = labels

    def label(self, index: int) -> int:
        """The class of a sample."""
        return self._labels[index % len(self._labels)]

    def write_rows(self, count: int) -> None:
        """Write ``samples.jsonl`` for the first ``count`` samples and all that are there."""
        count = max([count, *(int(p.stem) + 1 for p in self.path.glob("[0-9]*[0-9].png"))])
        unshared = {"classes", *UNCOMPARED}
        shared = {name: value for name, value in self.settings.items() if name not in unshared}
        rows = [
            {
                "file": self.file(index).name,
                "index": index,
                "class": self.label(index),
                "class_name": self._classes[self.label(index)],
                **shared,
            }
            for index in range(count)
        ]
        write_text(self.path / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def draw_grid(self, count: int) -> Path:
        """A column for each class if there are several and they fit, else nearly a square."""
        shown = min(count, MAX_GRID)
        images = [self._read(index) for index in range(shown)]
        num_classes = len(set(self._labels))
        columns = num_classes if 1 < num_classes <= 20 else max(1, round(shown**0.5))
        path = self.path / "grid.png"
        write_png(path, image_grid(images, columns))
        return path

    def write_npz(self, count: int) -> Path:
        """ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,); not held in memory."""
        target, scratch = self.path / "samples.npz", self.path / ".samples.npy.part"
        shape = (count, *self._read(0).shape)
        try:
            images = np.lib.format.open_memmap(scratch, "w+", np.uint8, shape)
            for index in range(count):
                images[index] = self._read(index)
            labels = np.array([self.label(index) for index in range(count)], dtype=np.int64)
            arrays: dict[str, np.ndarray[Any, Any]] = {"arr_0": images, "arr_1": labels}
            write_file(target, lambda part: write_arrays(part, arrays))
        finally:
            scratch.unlink(missing_ok=True)
        return target

    def _read(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return read_image(self.file(index), str(self.file(index)))
