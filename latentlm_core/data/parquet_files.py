"""Parquet files whose row groups are read at random, wherever fsspec finds them.

Opening reads the footers, which say how many rows each row group has; so the length is known and a
position is arithmetic. A row group is read whole, of the columns that are wanted alone; one of
another place than this disk is kept in the cache (``remote``), where all processes of this machine
find it. What tells a file from a later one at its place is the footer as well as what the file
system says, for web servers say nothing.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from latentlm_core import files
from latentlm_core.data import remote
from latentlm_core.data.blocks import Blocks
from latentlm_core.data.columns import one_sentence
from latentlm_core.errors import DataError

NUM_FOOTERS = 16
"""Footers that are read at once."""
NUM_READERS = 4
"""Row groups that are read at once."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group.

    Attributes:
        file: the number of its file.
        place: its number in the file.
        num_rows: rows.
        num_bytes: by column.
        largest: of columns of numbers, where the footer says it.
    """

    file: int
    place: int
    num_rows: int
    num_bytes: dict[str, int]
    largest: dict[str, int]


class ParquetFiles:
    """Parquet files with the same columns (a ``streamed_table.BlockFiles``).

    Args:
        places: paths or URLs, in order.
        name: what they are called in messages.

    Raises:
        ArtifactError: one cannot be reached or is no parquet.
        DataError: they have no rows, or not the same columns.
        MissingExtraError: a package that reads such URLs is not installed.
    """

    num_readers = NUM_READERS

    def __init__(self, places: Sequence[str], name: str) -> None:
        import datasets

        self._places = places
        self._footer = lru_cache(maxsize=NUM_FOOTERS)(self._read_footer)
        with ThreadPoolExecutor(NUM_FOOTERS) as readers:
            found = list(readers.map(self._open, range(len(places))))
        schema = found[0].schema
        for place, file in zip(places, found, strict=True):
            missing = [column for column in schema.names if column not in file.schema.names]
            if missing:
                raise DataError(
                    f"{name}: {place} has no column {missing[0]}, which {places[0]} has."
                )
        with one_sentence(f"{name} has columns that cannot be read"):
            self.features = datasets.Features.from_arrow_schema(schema)
        self._keys = [file.key for file in found]
        self._groups = [group for file in found for group in file.groups if group.num_rows]

    def blocks(self, columns: Sequence[str]) -> Blocks:
        """See ``BlockFiles``."""
        return Blocks.of_counts(
            [group.num_rows for group in self._groups],
            [sum(group.num_bytes[column] for column in columns) for group in self._groups],
        )

    def read(self, number: int, features: Any) -> Any:
        """See ``BlockFiles``."""
        from datasets.table import table_cast

        group, columns = self._groups[number], list(features)
        key = self._keys[group.file]
        if key is None:
            table = self._read_group(group, columns)
        else:
            table = self._read_kept(group, columns, key)
        return table_cast(table.select(columns), features.arrow_schema)

    def largest(self, column: str) -> int | None:
        """See ``BlockFiles``."""
        known = [group.largest.get(column) for group in self._groups]
        told = [number for number in known if number is not None]
        return max(told) if len(told) == len(known) and told else None

    def _read_group(self, group: _Group, columns: Sequence[str]) -> Any:
        import pyarrow.parquet as pq

        file_system, path = remote.open_filesystem(self._places[group.file])
        footer = self._footer(group.file)
        with file_system.open(path, "rb", cache_type="none") as file:
            opened = pq.ParquetFile(file, metadata=footer, pre_buffer=False)
            return opened.read_row_group(group.place, columns=list(columns), use_threads=False)

    def _read_kept(self, group: _Group, columns: Sequence[str], key: str) -> Any:
        """By way of the cache, memory-mapped."""
        name = remote.digest(self._places[group.file], key, group.place, *columns)
        path = remote.cache_folder() / "blocks" / f"{name}.arrow"
        copy = remote.kept(
            path, lambda path: _write(self._read_group(group, columns), path), _is_whole
        )
        return _map(copy)

    def _read_footer(self, file: int) -> Any:
        import pyarrow.parquet as pq

        file_system, path = remote.open_filesystem(self._places[file])
        with file_system.open(path, "rb", cache_type="none") as opened:
            return pq.read_metadata(opened)

    def _open(self, file: int) -> "_Opened":
        place = self._places[file]
        with remote.reaching(place):
            footer = self._footer(file)
            schema = footer.schema.to_arrow_schema()
            columns = _columns(footer, schema.names)
            groups = [_group(footer, columns, file, k) for k in range(footer.num_row_groups)]
            return _Opened(schema, groups, _key(place, footer) if remote.is_url(place) else None)


@dataclass(frozen=True, slots=True)
class _Opened:
    """What is kept of a footer: columns, row groups, and what tells the file from a later one."""

    schema: Any
    groups: list[_Group]
    key: str | None


def _key(place: str, footer: Any) -> str:
    import pyarrow as pa

    file_system, path = remote.open_filesystem(place)
    content = pa.BufferOutputStream()
    footer.write_metadata_file(content)
    return remote.digest(file_system.ukey(path), content.getvalue().to_pybytes())


def _columns(footer: Any, names: Sequence[str]) -> list[str]:
    """Of each leaf of a file the column: paths are NAME or NAME.PART, and names may have points."""
    paths = [footer.schema.column(k).path for k in range(footer.num_columns)]
    return [max((n for n in names if f"{path}.".startswith(f"{n}.")), key=len) for path in paths]


def _group(footer: Any, columns: Sequence[str], file: int, place: int) -> _Group:
    found = footer.row_group(place)
    num_bytes: dict[str, int] = {}
    largest: dict[str, int] = {}
    for k, name in enumerate(columns):
        column = found.column(k)
        num_bytes[name] = num_bytes.get(name, 0) + column.total_uncompressed_size
        statistics = column.statistics
        if statistics is not None and statistics.has_min_max and isinstance(statistics.max, int):
            largest[name] = statistics.max
    return _Group(file, place, found.num_rows, num_bytes, largest)


def _write(table: Any, path: Path) -> None:
    import pyarrow as pa

    def write(part: Path) -> None:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    files.write_file(path, write)


def _map(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _is_whole(path: Path) -> bool:
    """Whether a copy can be opened: its end, which is written last, is there."""
    import pyarrow as pa

    try:
        _map(path)
    except (pa.ArrowInvalid, OSError):
        return False
    return True
