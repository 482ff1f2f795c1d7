"""A table that is read block by block while it is used, and never whole.

It answers as a ``datasets.Dataset`` does where a source of images or recordings asks: features,
columns to select and to cast, a length, a row at an index. What lies behind it are parquet files
(``parquet_files``), whose row groups are read at random, or files that are read forwards
(``forward_files``).

Blocks that were used last are held in memory, up to a bound; threads read those that are expected.
What cannot be read ends the command, and is no broken item that is left out: the next attempt may
read it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from latentlm_core.data.blocks import Blocks
from latentlm_core.data.remote import reaching

MEMORY_BYTES = 4 * 128 * 2**20
"""What the blocks of a table take in memory, unless one takes more."""


class BlockFiles(Protocol):
    """Files whose rows come in blocks."""

    @property
    def features(self) -> Any:
        """The ``datasets.Features`` of a row."""

    @property
    def num_readers(self) -> int:
        """How many blocks may be read at once."""

    def blocks(self, columns: Sequence[str]) -> Blocks:
        """How the rows lie, with the bytes of these columns."""

    def read(self, number: int, features: Any) -> Any:
        """The ``pyarrow.Table`` of a block, of these features alone."""

    def largest(self, column: str) -> int | None:
        """The largest number of a column, where it is known without reading the column."""


class StreamedTable:
    """Rows of some files (a ``blocks.BlockReader``).

    Args:
        block_files: holds them.
        name: what they are called in messages.
        features: of the columns that are read; all of them by default.
    """

    def __init__(self, block_files: BlockFiles, name: str, features: Any | None = None) -> None:
        self.name = name
        self.features = block_files.features if features is None else features
        self.memory_bytes = MEMORY_BYTES
        self.blocks = block_files.blocks(list(self.features))
        self._files = block_files
        self._held = HeldBlocks(
            self._read, self.blocks.num_bytes, self.memory_bytes, block_files.num_readers
        )

    def __len__(self) -> int:
        return self.blocks.items[-1].stop if self.blocks.items else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row at an index; pictures and recordings are not decoded.

        Raises:
            ArtifactError: its block cannot be read.
        """
        number = self.blocks.holding(index)
        table = self._held[number]
        row = index - self.blocks.items[number].start
        return {column: table.column(column)[row].as_py() for column in self.features}

    def select_columns(self, columns: Sequence[str]) -> "StreamedTable":
        """The same rows with some of their columns."""
        import datasets

        kept = datasets.Features({column: self.features[column] for column in columns})
        return StreamedTable(self._files, self.name, kept)

    def cast_column(self, column: str, feature: Any) -> "StreamedTable":
        """The same rows with a column of another type."""
        import datasets

        return StreamedTable(
            self._files, self.name, datasets.Features({**self.features, column: feature})
        )

    def column(self, name: str) -> list[Any]:
        """A whole column, for which nothing else is read (of files that are read forwards, all)."""
        alone = self.select_columns([name])
        return [
            cell
            for number in range(len(self.blocks.items))
            for cell in alone._read(number).column(name).to_pylist()
        ]

    def largest(self, column: str) -> int:
        """The largest number of a column; -1 where it has none."""
        known = self._files.largest(column)
        if known is not None:
            return known
        return max((cell for cell in self.column(column) if cell is not None), default=-1)

    def expect(self, numbers: Sequence[int]) -> None:
        """Begin to read these blocks."""
        for number in numbers:
            self._held.begin(number)

    def _read(self, number: int) -> Any:
        with reaching(self.name):
            return self._files.read(number, self.features)


class HeldBlocks:
    """Blocks in memory: those used last, and those that threads are reading.

    Args:
        read: a block by its number.
        num_bytes: what each takes, before it is read.
        max_bytes: what they may take; the one used last stays.
        num_readers: threads.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        num_bytes: Sequence[int],
        max_bytes: int,
        num_readers: int,
    ) -> None:
        self._read = read
        self._num_bytes, self._max_bytes = num_bytes, max_bytes
        self._held: OrderedDict[int, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="blocks")

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Any:
        """A block, which is waited for if it is not here yet."""
        return self.begin(number).result()

    def begin(self, number: int) -> "Future[Any]":
        """A block that is here, or will be; one that could not be read is tried again."""
        with self._lock:
            future = self._held.get(number)
            if future is None or (future.done() and future.exception()):
                future = self._held[number] = self._readers.submit(self._run, number)
                self._forget()
            self._held.move_to_end(number)
            return future

    def _run(self, number: int) -> Any:
        """Read, unless the program ends: it would wait for everything that is begun."""
        if not threading.main_thread().is_alive():
            raise RuntimeError("The program is ending.")
        return self._read(number)

    def _forget(self) -> None:
        """Let go of what was used longest ago, until the rest takes what it may."""
        sizes = {number: self._size(number, future) for number, future in self._held.items()}
        excess = sum(sizes.values()) - self._max_bytes
        for number in list(self._held)[:-1]:
            if excess <= 0:
                return
            del self._held[number]
            excess -= sizes[number]

    def _size(self, number: int, future: "Future[Any]") -> int:
        if future.done() and not future.exception():
            return max(getattr(future.result(), "nbytes", 0), self._num_bytes[number])
        return self._num_bytes[number]
