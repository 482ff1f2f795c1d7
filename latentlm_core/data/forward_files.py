"""Files that are read forwards: archives and whatever else the `datasets` library streams.

Such files do not say how many items they have, so they are read through once, when they are first
opened, and counted; the counts are kept in the cache. From then on the length is known, a position
is arithmetic, and an epoch shuffles the files and what lies near to each other in them. Resuming
inside a file reads over all that comes before in that file.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from latentlm_core import files
from latentlm_core.config import Config, build
from latentlm_core.data import remote
from latentlm_core.data.blocks import Blocks
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, DataError

BLOCK_BYTES = 32 * 2**20
"""A block takes about this."""
MAX_ROWS = 4096
"""Rows of a block at most."""
NUM_COUNTED = 8
"""Files that are counted at once."""
_COUNTED_ROWS = 256


class Counts(Config):
    """What is known of the files of a stream."""

    num_rows: tuple[Annotated[int, Ge(0)], ...]
    """Items of each file."""
    num_bytes: Annotated[int, Ge(0)]
    """Of all items."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A block: its file, and its rows there."""

    file: int
    rows: range


class ForwardFiles:
    """A stream of the `datasets` library, by files (a ``streamed_table.BlockFiles``).

    Args:
        table: a ``datasets.IterableDataset`` whose columns are known.
        key: tells its files from others and from later ones.
        name: what it is called in messages.

    Raises:
        ArtifactError: it cannot be read.
        DataError: the library does not say what its columns are.
    """

    num_readers = 1

    def __init__(self, table: Any, key: str, name: str) -> None:
        if table.features is None:
            raise DataError(
                f"{name} does not say what its columns are.", hint="Parquet files say so."
            )
        self.features = table.features
        self._table, self._name = table, name
        counts = self._counts(remote.cache_folder() / "streams" / f"{key}.json")
        self._row_bytes = counts.num_bytes / max(sum(counts.num_rows), 1)
        self._block_rows = int(min(max(BLOCK_BYTES // max(self._row_bytes, 1), 1), MAX_ROWS))
        self._places = [
            _Place(file, range(first, min(first + self._block_rows, num_rows)))
            for file, num_rows in enumerate(counts.num_rows)
            for first in range(0, num_rows, self._block_rows)
        ]
        self._lock = threading.Lock()
        self._open: tuple[_Place, Any, Iterator[Any]] | None = None

    def blocks(self, columns: Sequence[str]) -> Blocks:
        """See ``BlockFiles``; columns are not told apart."""
        sizes = [len(place.rows) for place in self._places]
        each = Blocks.of_counts(sizes, [int(size * self._row_bytes) for size in sizes])
        num_blocks = [0] * self._table.num_shards
        for place in self._places:
            num_blocks[place.file] += 1
        ends = accumulate(num_blocks)
        together = (range(end - count, end) for end, count in zip(ends, num_blocks, strict=True))
        return Blocks(each.items, each.num_bytes, each.numbers, tuple(filter(len, together)))

    def read(self, number: int, features: Any) -> Any:
        """See ``BlockFiles``; the next block of the same file goes on where this one ends."""
        place = self._places[number]
        with self._lock:
            tables = self._tables_from(place, features)
            table = next(tables, None)
            self._open = None
            if table is None or len(table) != len(place.rows):
                raise ArtifactError(
                    f"{self._name} has other files than when they were counted.",
                    hint=f"Remove {remote.cache_folder() / 'streams'}, and they are counted again.",
                )
            self._open = _Place(place.file, place.rows[len(place.rows) :]), features, tables
        return table

    def largest(self, column: str) -> int | None:
        """See ``BlockFiles``: nothing is known."""
        return None

    def _tables_from(self, place: _Place, features: Any) -> Iterator[Any]:
        if self._open is not None:
            following, known, tables = self._open
            is_next = (following.file, following.rows.start) == (place.file, place.rows.start)
            if is_next and known == features:
                return tables
        table = self._table.select_columns(list(features)).cast(features)
        part = table.shard(self._table.num_shards, place.file).skip(place.rows.start)
        return iter(part.with_format("arrow").iter(self._block_rows))

    def _counts(self, path: Path) -> Counts:
        try:
            counts = build(Counts, files.read_json(path), str(path))
        except (ArtifactError, ConfigError, CorruptFileError):
            counts = self._count()
            files.write_json(path, counts.to_dict())
        return counts

    def _count(self) -> Counts:
        with remote.reaching(self._name), ThreadPoolExecutor(NUM_COUNTED) as readers:
            found = list(readers.map(self._measure, range(self._table.num_shards)))
        return Counts(
            num_rows=tuple(rows for rows, _ in found), num_bytes=sum(size for _, size in found)
        )

    def _measure(self, file: int) -> tuple[int, int]:
        """Rows and bytes of a file."""
        num_rows = num_bytes = 0
        part = self._table.select_columns(list(self.features))  # else their order may differ
        part = part.shard(self._table.num_shards, file)
        for table in part.with_format("arrow").iter(_COUNTED_ROWS):
            num_rows += len(table)
            num_bytes += table.nbytes
        return num_rows, num_bytes
