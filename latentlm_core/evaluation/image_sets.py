"""Image sets: anything that yields uint8 RGB images of one size, in a fixed order.

Notable choices:
- A set is a recipe for iterating, not an array: it is read again for each pass, with the decoding
  of files done a little ahead by threads.
- A batch has fixed places in its set, whatever is broken and whoever reads it, so processes share a
  pass by its batches, and only decode their own.
- Nothing is resized but a data set, and that by ADM's centre crop (``data.media.center_crop``);
  what the resize rule was travels with the set into the report.

Axes: N images, B batch, H W image.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from latentlm_core.data.base import Image, SkipLog, SkippedItem, Source
from latentlm_core.data.media import SUFFIXES, center_crop, read_image
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.evaluation.npz import npz_keys, npz_member, read_exactly
from latentlm_core.processes import current
from latentlm_core.progress import SILENT, Progress

Made = TypeVar("Made")
Reader = Callable[[Sequence[range]], Iterator[Sequence[Image]]]
"""Rising places => their images, range by range, what is broken left out."""

LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
_MAX_SIDE = 16384
_READ_AHEAD = 64


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images uint8 (H, W, 3) in a fixed order.

    Attributes:
        name: where they come from, for bars and reports.
        count: N, the broken images of a data set included.
        image_size: (H, W), the same for all.
        read: starts a pass over some of them.
        resize: what was done to get to ``image_size``.
        labels: the class of each image, where that is known.
        num_classes: of the data set that they are, where that is known.
        lossy: whether they went through a lossy format.
        skipped: what was broken in the passes so far, where something may be.
    """

    name: str
    count: int
    image_size: tuple[int, int]
    read: Reader
    resize: str = "none"
    labels: tuple[int, ...] | None = None
    num_classes: int | None = None
    lossy: bool = False
    skipped: SkipLog | None = None

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[Image]:
        """Arrays uint8 (B, H, W, 3), the last one possibly smaller.

        Raises:
            DataError: an image cannot be read, or has another size than the set.
        """
        for images in self.read(self._places(batch_size)):
            if len(images):
                yield np.stack(images)

    def map_batches(self, batch_size: int, make: Callable[[int, Image], Made]) -> Iterator[Made]:
        """What ``make`` makes of each batch, in their order; processes take the batches in turn.

        All processes (``processes.current``) must call this alike, and all get everything.

        Args:
            batch_size: B.
            make: from the place of a batch's first image and images uint8 (B, H, W, 3) to
                something that pickles.

        Raises:
            DataError: an image cannot be read, or has another size than the set.
        """
        processes = current()
        own = list(processes.own(self._places(batch_size)))
        batches = zip(own, self.read(own), strict=True)
        mine = (
            make(places.start, np.stack(images)) if len(images) else None
            for places, images in batches
        )
        for made in processes.merged(mine):
            if made is not None:
                yield made
        if self.skipped is not None:
            for items in processes.gather(self.skipped.items):
                self.skipped.extend(items)

    def first(self, count: int) -> "ImageSet":
        """Only the first ``count`` images."""
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, count=min(count, self.count), labels=labels)

    def _places(self, batch_size: int) -> list[range]:
        starts = range(0, self.count, batch_size)
        return [range(start, min(start + batch_size, self.count)) for start in starts]

    @property
    def label_policy(self) -> str:
        """How the classes are spread: balanced, one class, unbalanced or unknown."""
        if self.labels is None:
            return "unknown"
        counts = Counter(self.labels)
        if len(counts) == 1:
            return "one class"
        return "balanced" if len(set(counts.values())) == 1 else "unbalanced"

    @property
    def num_covered(self) -> int | None:
        """How many classes there are images of, if that is known."""
        return self.num_classes if self.labels is None else len(set(self.labels))


def open_images(path: Path) -> ImageSet:
    """Open a folder of image files or an npz of images.

    Raises:
        DataError: neither is there, or it holds no usable images.
    """
    return image_folder(path) if path.is_dir() else image_npz(path)


def image_folder(folder: Path) -> ImageSet:
    """The image files of a folder, sorted by name, without subfolders and ``grid.png``.

    The classes are taken from a ``samples.jsonl`` beside them, if there is one.

    Raises:
        DataError: the folder is missing or has no images.
        CorruptFileError: its first image cannot be decoded, or its ``samples.jsonl`` is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.name != "grid.png"
    )
    if not paths:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    height, width = read_image(paths[0], str(paths[0])).shape[:2]

    def read(path: Path) -> Image:
        image = read_image(path, str(path))
        if image.shape != (height, width, 3):
            raise DataError(
                f"{path} is {image.shape[1]}x{image.shape[0]}, but the first image of its folder "
                f"is {width}x{height}; all must have one size."
            )
        return image

    return ImageSet(
        name=folder.name,
        count=len(paths),
        image_size=(height, width),
        read=lambda wanted: _read_ahead(read, paths, wanted),
        labels=_sample_labels(folder / "samples.jsonl", paths),
        lossy=any(path.suffix.lower() in LOSSY_SUFFIXES for path in paths),
    )


def image_npz(path: Path) -> ImageSet:
    """The images ``arr_0`` uint8 (N, H, W, 3) of an npz, as ADM's evaluator exchanges them.

    Labels are taken from ``arr_1`` (N,), if there is one.

    Raises:
        DataError: there is no such array, or it has another type or shape.
        CorruptFileError: the file is damaged.
    """
    with npz_member(path, "arr_0") as member:
        shape, dtype = member.shape, member.dtype
        usable = len(shape) == 4 and shape[3] == 3 and min(shape) > 0
        if not usable or max(shape[1:3]) > _MAX_SIDE or dtype != np.uint8 or member.fortran:
            raise DataError(
                f"{path}[arr_0] must be uint8 images (N, H, W, 3), not {dtype} {shape}."
            )
    count, height, width, _ = shape

    def read(wanted: Sequence[range]) -> Iterator[Sequence[Image]]:
        with npz_member(path, "arr_0") as member:

            def read_one() -> Image:
                content = read_exactly(member.stream, height * width * 3, f"{path}[arr_0]")
                return np.frombuffer(content, np.uint8).reshape(height, width, 3)

            place = 0
            for places in wanted:
                for _ in range(place, places.start):
                    read_one()
                yield [read_one() for _ in places]
                place = places.stop

    return ImageSet(path.name, count, (height, width), read, labels=_npz_labels(path, count))


def image_source(source: Source, image_size: int, progress: Progress = SILENT) -> ImageSet:
    """The images of a data set, centre-cropped to ``image_size`` as ADM does.

    Broken items are left out and told to ``progress``; too many of them end the pass.
    """
    skipped = SkipLog(source, progress)

    def read_some(places: range) -> Iterator[Image]:
        for index in places:
            try:
                image = source[index].image
            except DataError as error:
                skipped.add(SkippedItem(index=index, reason=str(error)))
            else:
                yield center_crop(image, image_size)

    return ImageSet(
        name=source.name,
        count=len(source),
        image_size=(image_size, image_size),
        read=lambda wanted: (list(read_some(places)) for places in wanted),
        resize=f"ADM centre crop to {image_size}",
        num_classes=len(source.classes) or None,
        skipped=skipped,
    )


def image_array(images: Image, name: str, labels: Sequence[int] | None = None) -> ImageSet:
    """Images uint8 (N, H, W, 3) that are in memory already.

    Raises:
        DataError: another type or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(
            f"{name} must be uint8 images (N, H, W, 3), not {images.dtype} {images.shape}."
        )
    count, height, width, _ = images.shape
    known = None if labels is None else tuple(labels)

    def read(wanted: Sequence[range]) -> Iterator[Sequence[Image]]:
        return (list(images[places.start : places.stop]) for places in wanted)

    return ImageSet(name, count, (height, width), read, labels=known)


def _read_ahead(
    read: Callable[[Path], Image], paths: Sequence[Path], wanted: Sequence[range]
) -> Iterator[Sequence[Image]]:
    """Decode files range by range, a few ahead, by threads (Pillow lets go of the interpreter)."""
    images = _decode_ahead(read, [paths[index] for places in wanted for index in places])
    for places in wanted:
        yield list(islice(images, len(places)))


def _decode_ahead(read: Callable[[Path], Image], paths: Sequence[Path]) -> Iterator[Image]:
    pending: deque[Future[Image]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for path in paths:
                pending.append(pool.submit(read, path))
                if len(pending) > _READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _sample_labels(record: Path, paths: Sequence[Path]) -> tuple[int, ...] | None:
    """The classes of files as their ``samples.jsonl`` names them, None if it does not name all."""
    if not record.is_file():
        return None
    classes = {}
    for number, line in enumerate(record.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
            classes[entry["file"]] = entry["class"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise CorruptFileError(
                f"{record}:{number} must be a JSON object with the keys file and class.",
                hint="Samples of speech are measured by: latentlm eval wer, sim and drift",
            ) from None
    labels = [classes.get(path.name) for path in paths]
    known = tuple(label for label in labels if isinstance(label, int))
    return known if len(known) == len(labels) else None


def _npz_labels(path: Path, count: int) -> tuple[int, ...] | None:
    """The classes ``arr_1`` of an npz as ADM's sampling scripts write them."""
    if "arr_1" not in npz_keys(path):
        return None
    where = f"{path}[arr_1]"
    with npz_member(path, "arr_1") as member:
        if member.shape != (count,) or member.dtype.kind not in "iu":
            raise DataError(
                f"{where} must be integers of shape ({count},), not {member.dtype} {member.shape}."
            )
        content = read_exactly(member.stream, count * member.dtype.itemsize, where)
        return tuple(np.frombuffer(content, member.dtype).tolist())
