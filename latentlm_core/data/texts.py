"""Sets of documents by name, and the endless sequences that are trained on.

    pydoc                       the topics of Python's own documentation: 79 documents, 465,000
                                characters of English, in every installation
    FILE.txt or FILE.md         one document
    FOLDER                      .txt and .md files below it, each one a document; or parquet files
    FILE.jsonl, FILE.csv        a document a line or row, in the column text (or a usual name)
    hf:ORG/NAME[:SPLIT]         any set with a column of text that the `datasets` library loads
    stream:hf:ORG/NAME[:SPLIT]  the same, read while it is downloaded
    stream:FOLDER               parquet files, read in their order

Notable choices:
    what is held out does not depend on a seed: the test split of a set, else every twentieth
    document (``sources.hold_out``), else the end of the only document; so an evaluation reads
    nothing that any run was trained on;
    an empty document is left out; in an endless sequence the next one of the epoch's order stands
    in its place.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, overload

from latentlm_core.data.columns import find_parquet, read_hub, read_parquet
from latentlm_core.data.folders import find_split
from latentlm_core.data.order import MAX_HELD_OUT, EpochOrder
from latentlm_core.data.sources import SPLITS, hold_out, spread
from latentlm_core.data.text_sources import (
    TEXT_SUFFIXES,
    CsvTexts,
    FileTexts,
    JsonlTexts,
    ListTexts,
    TableTexts,
    TextItem,
    TextSource,
    open_text_folder,
)
from latentlm_core.data.text_stream import StreamedTexts, open_streamed_folder, open_streamed_hub
from latentlm_core.errors import DataError, did_you_mean

__all__ = ["EndlessTexts", "TextItem", "Texts", "is_parted", "open_endless_texts", "open_texts"]

PYDOC = "pydoc"
NAMES = (PYDOC, "FILE.txt", "FILE.jsonl", "FILE.csv", "FOLDER", "hf:ORG/NAME", "stream:NAME")
STREAM = "stream:"
HUB = "hf:"
ALL = "all"
"""The split of a set that has none."""
END_SHARE = 0.05
"""Share of the only document that is held out."""


class EndlessTexts(Protocol):
    """Documents 0, 1, 2, ... without end; each follows from the seed and its place alone."""

    name: str

    def __getitem__(self, place: int) -> TextItem:
        """The document at a place.

        Raises:
            DataError: it cannot be read.
        """

    @property
    def held_out(self) -> Sequence[TextItem]:
        """Documents that are never trained on."""


class Texts(Sequence[TextItem]):
    """Documents of a set, read when they are asked for.

    Args:
        source: the set.
        indices: which of it, in this order.
    """

    def __init__(self, source: TextSource, indices: Sequence[int]) -> None:
        self.name = source.name
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TextItem: ...

    @overload
    def __getitem__(self, index: slice) -> "Texts": ...

    def __getitem__(self, index: int | slice) -> "TextItem | Texts":
        if isinstance(index, slice):
            return Texts(self._source, self._indices[index])
        return self._source[self._indices[index]]


class ShuffledTexts:
    """An endless sequence of a finite set: a permutation per epoch.

    Args:
        train: the documents.
        held_out: those that are never trained on.
        seed: of the run.

    Raises:
        DataError: there is nothing to train on.
    """

    def __init__(self, train: TextSource, held_out: Sequence[TextItem], seed: int) -> None:
        self.name = train.name
        self.held_out = held_out
        self._train = train
        self._order = EpochOrder(len(train), 0.0, seed, 1, train.name)

    def __getitem__(self, place: int) -> TextItem:
        for later in range(place, place + len(self._train)):
            item = self._train[self._order[later]]
            if _has_text(item):
                return item
        raise DataError(f"{self.name} has no document with text.")


def open_endless_texts(spec: str, seed: int, held_out: float) -> EndlessTexts:
    """Open a set to train on.

    Args:
        spec: a name, as this module's text lists them.
        seed: of the run; a stream is read in its own order.
        held_out: share of the documents that validate at most, out of those that are held out
            anyway; at most 2,048, and one where the share is not 0. A stream has no shares: all
            that it holds out validate, or none where this is 0.

    Raises:
        DataError: unknown name, nothing there, no column of text, or not readable.
    """
    if spec.startswith(STREAM):
        stream = _open_stream(spec)
        if not held_out:
            stream.held_out = ()
        return stream
    train, test = _open_parts(spec)
    count = min(int(held_out * (len(train) + len(test))), MAX_HELD_OUT)
    validating = spread(test, max(count, 1) if held_out else 0)
    return ShuffledTexts(train, _with_text(validating), seed)


def open_texts(spec: str, split: str = "test") -> Sequence[TextItem]:
    """Open a set to read it once.

    Args:
        spec: a name, as this module's text lists them.
        split: `test`, all that ``open_endless_texts`` never trains on; `train`, the rest; or `all`,
            of a set that is not parted already, such as a file.

    Raises:
        DataError: as ``open_endless_texts``; or no such split, or it has no text.
    """
    if split not in (*SPLITS, ALL):
        raise DataError(f"There is no split {split!r}. {did_you_mean(split, (*SPLITS, ALL))}")
    if spec.startswith(STREAM):
        if split != "test":
            raise DataError(f"{spec}: of a stream only the split 'test' can be read once.")
        return _open_stream(spec).held_out
    if split == ALL:
        source = _open_whole(spec)
    else:
        own_test = _open(spec, "test") if split == "test" else None
        source = own_test or _open_parts(spec)[SPLITS.index(split)]
    texts = _with_text(source)
    if not texts:
        raise DataError(f"{spec} has no document with text in its split {split!r}.")
    return texts


def is_parted(spec: str) -> bool:
    """Whether a set has a test split; of a stream that is not asked, and taken to be so."""
    return spec.startswith(STREAM) or bool(_open(spec, "test"))


def _open_whole(spec: str) -> TextSource:
    whole = _open(spec, "train")
    if whole is None or is_parted(spec):
        raise DataError(f"{spec} is parted already, into {' and '.join(SPLITS)}.")
    return whole


def _open_parts(spec: str) -> tuple[TextSource, TextSource]:
    """(what is trained on, what is held out)."""
    train, test = (_open(spec, split) for split in SPLITS)
    if train is None or not len(train):
        raise DataError(f"{spec} has no documents to train on.")
    if test is not None and len(test):
        return train, test
    return hold_out(train) if len(train) > 1 else _part(train)


def _part(source: TextSource) -> tuple[TextSource, TextSource]:
    """The only document, parted at the last line end before the share that is held out."""
    text, key = source[0]
    at = int(len(text) * (1 - END_SHARE))
    cut = text.rfind("\n", 0, at) + 1 or at
    parts = TextItem(text[:cut], key), TextItem(text[cut:], f"{key}#end")
    if not all(map(_has_text, parts)):
        raise DataError(f"{source.name} is too short to hold some of it out.")
    train, test = (ListTexts([part], source.name) for part in parts)
    return train, test


def _open(spec: str, split: str) -> TextSource | None:
    """None where the set has no such split."""
    path = Path(spec)
    if spec == PYDOC:
        return _open_pydoc() if split == "train" else None
    if spec.startswith(HUB):
        return _open_hub(spec, split)
    if os.path.isdir(spec):
        return _open_folder(path, spec, split)
    if not os.path.isfile(spec):
        if os.sep in spec or path.suffix:
            raise DataError(f"There is no file or folder {spec}.")
        raise DataError(f"There is no set of texts {spec!r}. {did_you_mean(spec, NAMES)}")
    return _open_file(path, spec) if split == "train" else None


def _open_pydoc() -> TextSource:
    from pydoc_data.topics import topics

    return ListTexts([TextItem(topics[key], key) for key in sorted(topics)], PYDOC)


def _open_hub(spec: str, split: str) -> TextSource | None:
    table = read_hub(spec.removeprefix(HUB), split, spec)
    return None if table is None else TableTexts(table, spec)


def _open_file(path: Path, name: str) -> TextSource:
    match path.suffix.lower():
        case suffix if suffix in TEXT_SUFFIXES:
            return FileTexts(path.parent, [path.name], name)
        case ".jsonl":
            return JsonlTexts(path, name)
        case ".csv":
            return CsvTexts(path, name)
    allowed = ", ".join((*TEXT_SUFFIXES, ".jsonl", ".csv"))
    raise DataError(f"{name} is no file of texts, whose names end in {allowed}.")


def _open_folder(root: Path, name: str, split: str) -> TextSource | None:
    if any(root.glob("*.parquet")):
        paths = find_parquet(root, split)
        return TableTexts(read_parquet(paths, name), name) if paths else None
    part = find_split(root, split)
    return None if part is None else open_text_folder(part, name)


def _open_stream(spec: str) -> StreamedTexts:
    rest = spec.removeprefix(STREAM)
    if rest.startswith(HUB):
        return open_streamed_hub(rest.removeprefix(HUB), spec)
    if not os.path.isdir(rest):
        raise DataError(
            f"{spec} is not of the form stream:hf:ORG/NAME[:SPLIT] or stream:FOLDER.",
            hint="Without stream: every file and folder of texts can be read.",
        )
    return open_streamed_folder(Path(rest), spec)


def _with_text(source: TextSource) -> Texts:
    return Texts(source, [index for index in range(len(source)) if _has_text(source[index])])


def _has_text(item: TextItem) -> bool:
    return bool(item.text) and not item.text.isspace()
