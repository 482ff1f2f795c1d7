"""A latent set that is being made: what it will be, what is done of it, and the making.

    progress/plan.json          the ``LatentPlan``, written first
    progress/shard-00000.json   a row of the manifest for each shard that is on the disk
    manifest.json               written last; then progress/ goes away

A set that is complete but was damaged becomes one that is being made, with its sound shards done.

Notable choices:
    shard k covers source indices [k * n, (k + 1) * n), whatever is broken, whoever makes it;
    what a modality encodes at once lies inside one shard and begins at a fixed place of it, so that
    a shard made after an interruption has the bytes that it would have had;
    shards are written in a thread, behind the encoder;
    several processes take the missing shards in turn; the main one alone holds the folder, looks at
    what is there, and writes the plan, the tokenizer and the manifest;
    the tokenizer is copied into the set, which is then all that a model needs.
"""

import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from pathlib import Path

import torch
from torch import nn

from latentlm_core import files
from latentlm_core.config import Config, build
from latentlm_core.data.base import MAX_BROKEN_SHARE, AnySource, SkipLog, SkippedItem
from latentlm_core.data.manifest import (
    MANIFEST,
    LatentPlan,
    LatentSums,
    Manifest,
    ShardEntry,
    read_manifest,
    shard_name,
)
from latentlm_core.data.pipeline import Throughput
from latentlm_core.data.shard_file import Encoded, write_shard
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, DataError
from latentlm_core.processes import current
from latentlm_core.progress import Bar, Progress
from latentlm_core.runtime import evaluating

PROGRESS = "progress"


class ShardRow(Config):
    """What is known of a shard once it is written."""

    entry: ShardEntry
    """Its row in the manifest."""
    skipped: tuple[SkippedItem, ...]
    """What it leaves out of the indices that it covers."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring items of the source that are read together.

    Attributes:
        shard: the number of the shard that they go to.
        indices: their places in the source.
    """

    shard: int
    indices: Sequence[int]


@dataclass(frozen=True, slots=True)
class Part:
    """What became of some items of a shard.

    Attributes:
        shard: its number.
        pieces: examples, each piece with the index in the source of its first one; the pieces of a
            shard are put in the order of these.
        skipped: items that were broken.
    """

    shard: int
    pieces: tuple[tuple[int, Encoded], ...]
    skipped: tuple[SkippedItem, ...]

    def __len__(self) -> int:
        """Items that it accounts for."""
        return sum(len(encoded) for _, encoded in self.pieces) + len(self.skipped)


def make_set(
    folder: Path,
    plan: LatentPlan,
    source: AnySource[object],
    tokenizer: nn.Module,
    tokenizer_export: Path,
    encode: Callable[[Sequence[Run], Throughput], Generator[Part, None, None]],
    *,
    run_size: int,
    unit: str,
    device: torch.device,
    progress: Progress,
    max_skipped_share: float = MAX_BROKEN_SHARE,
    throughput: Throughput | None = None,
) -> Manifest:
    """Make a latent set, or go on with one, or return the one that is there already.

    All processes (``processes.current``) must call this alike.

    Args:
        folder: where the set goes.
        plan: what the set is to be.
        source: what is encoded.
        tokenizer: what ``encode`` uses; is moved to ``device`` and evaluated there.
        tokenizer_export: folder of its export; a copy becomes part of the set.
        encode: from runs of the source to what became of them, in the order of the runs; what it
            waits for is counted.
        run_size: items of a run, fewer at the end of a shard.
        unit: what the items are called.
        device: where the encoder runs.
        progress: hears of items done and of broken ones.
        max_skipped_share: what part of the source may be broken.
        throughput: learns how long it took, and what was waited for, in all processes.

    Raises:
        DataError: the folder has another set, too many items are broken, or a latent is not
            finite.
        CorruptFileError: the manifest that is there is damaged.
        ArtifactError: the file system refused.
        BusyError: another process is writing the folder.
    """
    processes = current()
    with processes.in_main(files.locked(folder)):
        partial = processes.once(lambda: PartialSet(folder, plan))
        _refuse_other(folder, plan, partial.plan)
        if partial.missing:
            processes.once(partial.begin)
        copy = folder / files.TOKENIZER_FOLDER
        processes.once(lambda: _keep_tokenizer(tokenizer_export, copy, plan.tokenizer_sha256))
        if partial.missing:
            log = SkipLog(source, progress, max_skipped_share)
            log.extend(partial.skipped)
            runs = partial.runs(run_size, list(processes.own(partial.missing)))
            label, total = f"encoding {source.name}", plan.num_source
            own = Throughput()
            with (
                evaluating(tokenizer.to(device)),
                processes.bar(progress, label, total, unit, partial.num_done) as bar,
            ):
                own.start()
                with closing(encode(runs, own)) as parts:
                    write_behind(partial, parts, log, bar, own)
            for rows in processes.gather(partial.rows):
                partial.rows |= rows
            log.extend(partial.skipped)
            if throughput is not None:
                throughput.merge(processes.gather(own))
        return processes.once(partial.finish)


def weights_digest(export: Path) -> str:
    """SHA-256 of the weights of a tokenizer's export.

    Raises:
        ArtifactError: it has none.
    """
    path = export / files.WEIGHTS_FILE
    if not path.is_file():
        raise ArtifactError(f"{export} is no export of a tokenizer: it has no {path.name}.")
    return files.sha256_file(path)


class PartialSet:
    """A folder in which a latent set is made, held by this process or by the main one.

    Args:
        folder: the set's.
        plan: what the set is to be.

    Raises:
        DataError: the folder has a set that is not of this plan.
        CorruptFileError: the plan or the manifest there is damaged.
    """

    def __init__(self, folder: Path, plan: LatentPlan) -> None:
        self.folder = folder
        self.plan = plan
        self._complete = read_manifest(folder) if (folder / MANIFEST).is_file() else None
        plan_path = folder / PROGRESS / "plan.json"
        if self._complete is not None:
            _refuse_other(folder, plan, self._complete)
        elif plan_path.is_file():
            found = build(LatentPlan, files.read_sealed_json(plan_path), str(plan_path))
            _refuse_other(folder, plan, found)
        elif folder.is_dir() and {path.name for path in folder.iterdir()} - {".lock", PROGRESS}:
            raise DataError(
                f"{folder} is not empty, and what it holds is no latent set.",
                hint="Use another --out.",
            )
        self.rows = self._sound_rows()

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are yet to be made."""
        return [number for number in range(self.plan.num_shards) if number not in self.rows]

    @property
    def num_done(self) -> int:
        """Items that the shards cover which are there."""
        return sum(len(self.plan.covers(number)) for number in self.rows)

    @property
    def skipped(self) -> list[SkippedItem]:
        """What the shards that are there leave out."""
        return [item for number in sorted(self.rows) for item in self.rows[number].skipped]

    def runs(self, size: int, shards: Sequence[int]) -> list[Run]:
        """All items of some shards, shard by shard, ``size`` items at a time."""
        return [
            Run(number, covered[first : first + size])
            for number in shards
            for covered in (self.plan.covers(number),)
            for first in range(0, len(covered), size)
        ]

    def begin(self) -> None:
        """Write the plan; from here on the set is incomplete, and can be resumed."""
        files.write_sealed_json(self.folder / PROGRESS / "plan.json", self.plan.to_dict())
        if self._complete is not None:
            for number, row in self.rows.items():
                self._write_row(number, row)
            (self.folder / MANIFEST).unlink()

    def add(self, number: int, row: ShardRow) -> None:
        """Account for a shard that is on the disk."""
        self._write_row(number, row)
        self.rows[number] = row

    def finish(self) -> Manifest:
        """Write the manifest of a set whose every shard is there, or return the one there is."""
        if self._complete is not None and not (self.folder / PROGRESS).exists():
            return self._complete
        rows = [self.rows[number] for number in range(self.plan.num_shards)]
        entries = [row.entry for row in rows]
        sums = LatentSums.merge((entry.sums for entry in entries), self.plan.latent_channels)
        content = self.plan.to_dict() | {
            "name": self.folder.resolve().name,
            "num_examples": sum(entry.count for entry in entries),
            "shards": [entry.to_dict() for entry in entries],
            "statistics": sums.to_dict(),
            "skipped": [item.to_dict() for row in rows for item in row.skipped],
        }
        manifest = build(Manifest, content, f"the shards of {self.folder}")
        files.write_sealed_json(self.folder / MANIFEST, manifest.to_dict())
        shutil.rmtree(self.folder / PROGRESS)
        return manifest

    def _sound_rows(self) -> dict[int, ShardRow]:
        """Rows of the shards whose files are what the rows say."""
        rows = {number: self._read_row(number) for number in range(self.plan.num_shards)}
        return {number: row for number, row in rows.items() if row and self._is_sound(number, row)}

    def _read_row(self, number: int) -> ShardRow | None:
        if self._complete is not None:
            covered = self.plan.covers(number)
            skipped = tuple(item for item in self._complete.skipped if item.index in covered)
            return ShardRow(entry=self._complete.shards[number], skipped=skipped)
        path = self._row_path(number)
        if not path.is_file():
            return None
        try:
            return build(ShardRow, files.read_sealed_json(path), str(path))
        except (ConfigError, CorruptFileError):
            return None

    def _is_sound(self, number: int, row: ShardRow) -> bool:
        path = self.folder / shard_name(number)
        return (
            path.is_file()
            and path.stat().st_size == row.entry.num_bytes
            and files.sha256_file(path) == row.entry.sha256
        )

    def _write_row(self, number: int, row: ShardRow) -> None:
        files.write_sealed_json(self._row_path(number), row.to_dict())

    def _row_path(self, number: int) -> Path:
        return self.folder / PROGRESS / f"{Path(shard_name(number)).stem}.json"


def write_behind(
    partial: PartialSet, parts: Iterable[Part], log: SkipLog, bar: Bar, throughput: Throughput
) -> None:
    """Collect shards out of parts; a thread writes a shard while the next one is encoded.

    Args:
        partial: where they go.
        parts: of whole shards, one shard after the other.
        log: accounts for broken items.
        bar: hears of items done.
        throughput: counts them, and how long the parts have to wait.
    """
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for shard in whole_shards(partial.plan, _counted(parts, log, bar, throughput)):
            if pending:
                with throughput.writing():
                    pending.result()
            pending = writer.submit(finish_shard, partial, shard)
        if pending:
            with throughput.writing():
                pending.result()
    throughput.count(0)


def whole_shards(plan: LatentPlan, parts: Iterable[Part]) -> Iterator[list[Part]]:
    """The parts of each shard."""
    shard: list[Part] = []
    for part in parts:
        shard.append(part)
        if sum(map(len, shard)) == len(plan.covers(part.shard)):
            yield shard
            shard = []


def finish_shard(partial: PartialSet, parts: Sequence[Part]) -> None:
    """Write a shard, all parts of which are there, and account for it."""
    number = parts[0].shard
    pieces = sorted((piece for part in parts for piece in part.pieces), key=itemgetter(0))
    encoded = Encoded.join(partial.plan, [piece for _, piece in pieces])
    skipped = sorted((item for part in parts for item in part.skipped), key=attrgetter("index"))
    entry = write_shard(partial.folder, partial.plan, number, encoded)
    partial.add(number, ShardRow(entry=entry, skipped=tuple(skipped)))


def _counted(
    parts: Iterable[Part], log: SkipLog, bar: Bar, throughput: Throughput
) -> Iterator[Part]:
    for part in parts:
        log.extend(part.skipped)
        yield part
        throughput.count(len(part))
        bar.advance(len(part), **throughput.shares)


def _keep_tokenizer(export: Path, copy: Path, digest: str) -> None:
    """Copy the export into the set, unless it is there."""
    weights = copy / files.WEIGHTS_FILE
    if weights.is_file() and files.sha256_file(weights) == digest:
        return
    with files.write_folder(copy) as part:
        for path in sorted(export.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, part / path.name)


def _refuse_other(folder: Path, plan: LatentPlan, found: LatentPlan) -> None:
    there, here = dict(found), dict(plan)
    differing = [
        f"{name} ({there[name]!r} there, {here[name]!r} here)" if name in _SHOWN else name
        for name in LatentPlan.model_fields
        if there[name] != here[name]
    ]
    if differing:
        raise DataError(
            f"{folder} has latents that were made otherwise; these differ: {', '.join(differing)}.",
            hint="Use another --out, or remove that folder.",
        )


_SHOWN = (
    *("data", "split", "grid", "dtype", "variants"),
    *("num_source", "shard_size", "batch_size", "limits"),
)
"""Fields whose values are short enough for a message."""
