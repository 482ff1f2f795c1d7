"""Documents that are read while they come, by the `datasets` library in its streaming mode.

A stream has no length and is read forwards: places are its documents in their order, and behind
its end it begins again. Resuming at a place reads over all before it, some hundred thousand a
second where the network is no bound.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from latentlm_core.data.columns import find_parquet, is_text, one_sentence, read_hub
from latentlm_core.data.text_sources import TextItem, text_column
from latentlm_core.errors import DataError

NUM_HELD_OUT = 256
"""Documents at the beginning that are held out; of the test split where there is one."""
_BATCH = 256
"""Documents that the library hands over at once."""


class StreamedTexts:
    """An endless sequence over a stream.

    Args:
        train: a ``datasets.IterableDataset``.
        test: another of documents to hold out; None to hold out the first ones of ``train``.
        name: what it is called in messages.

    Attributes:
        held_out: the first 256 documents of ``test``, or of ``train``.

    Raises:
        DataError: it cannot be read, has no column of text, or no document to train on.
    """

    def __init__(self, train: Any, test: Any | None, name: str) -> None:
        self.name = name
        self._table = train
        self._skipped = 0 if test is not None else NUM_HELD_OUT
        held_out = islice(_read(train if test is None else test, name), NUM_HELD_OUT)
        self.held_out: Sequence[TextItem] = tuple(held_out)
        self._length: int | None = None
        self._place = -1
        self._item = TextItem("", "")
        self._items = self._open()

    def __getitem__(self, place: int) -> TextItem:
        """The document at a place; only a place before the last one is read for from the start."""
        if self._length is not None:
            place %= self._length
        if place < self._place:
            self._place, self._items = -1, self._open()
        while self._place < place:
            item = next(self._items, None)
            if item is None:
                return self._begin_again(place)
            self._place, self._item = self._place + 1, item
        return self._item

    def _begin_again(self, place: int) -> TextItem:
        self._length = self._place + 1
        if not self._length:
            raise DataError(
                f"{self.name} has no more than {self._skipped} documents, which are held out of a "
                "stream.",
                hint="Without stream: every twentieth is held out.",
            )
        return self[place]

    def _open(self) -> Iterator[TextItem]:
        return islice(_read(self._table, self.name), self._skipped, None)


def open_streamed_folder(folder: Path, name: str) -> StreamedTexts:
    """Stream a folder of parquet files.

    Raises:
        DataError: it has none, or as ``StreamedTexts``.
    """
    train, test = (find_parquet(folder, split) for split in ("train", "test"))
    if not train:
        raise DataError(f"{name}: there are no parquet files to train on in {folder}.")
    with one_sentence(f"{name} cannot be read"):
        tables = _stream(train), _stream(test)
    return StreamedTexts(*tables, name)


def open_streamed_hub(place: str, name: str) -> StreamedTexts:
    """Stream a set of the hub.

    Args:
        place: ORG/NAME, whose test split is held out where there is one; or ORG/NAME:SPLIT, of
            which the first documents are held out.
        name: what it is called in messages.

    Raises:
        DataError: as ``read_hub`` or ``StreamedTexts``.
    """
    train, test = (read_hub(place, split, name, streaming=True) for split in ("train", "test"))
    return StreamedTexts(train, test, name)


def _stream(paths: Sequence[Path]) -> Any | None:
    import datasets

    if not paths:
        return None
    files = [str(path) for path in paths]
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def _read(table: Any, name: str) -> Iterator[TextItem]:
    """Every document of a stream that has text; keys count them."""
    index = 0
    with one_sentence(f"{name} cannot be read"):
        column = _column(table, name)
        for batch in table.select_columns([column]).iter(_BATCH):
            for text in batch[column]:
                if text and not text.isspace():
                    yield TextItem(text, f"{index:08d}")
                    index += 1


def _column(table: Any, name: str) -> str:
    """By the types of the columns, or by the first row where the library does not know them."""
    if table.features is not None:
        texts = [key for key, kind in table.features.items() if is_text(kind)]
        return text_column(texts, table.features, name)
    first: dict[str, Any] = next(iter(table), {})
    return text_column([key for key, cell in first.items() if isinstance(cell, str)], first, name)
