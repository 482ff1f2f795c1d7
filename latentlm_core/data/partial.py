"""A latent set that is being made: what it will be, and what is done of it.

    progress/plan.json          the ``LatentPlan``, written first
    progress/shard-00000.json   a row of the manifest for each shard that is on the disk
    manifest.json               written last; then progress/ goes away

A set that is complete but was damaged becomes one that is being made, with its sound shards done.
"""

import shutil
from pathlib import Path

from latentlm_core import files
from latentlm_core.config import Config, build
from latentlm_core.data.base import SkippedItem
from latentlm_core.data.manifest import (
    MANIFEST,
    LatentPlan,
    LatentSums,
    Manifest,
    ShardEntry,
    read_manifest,
    shard_name,
)
from latentlm_core.errors import ConfigError, CorruptFileError, DataError

PROGRESS = "progress"


class ShardRow(Config):
    """What is known of a shard once it is written."""

    entry: ShardEntry
    """Its row in the manifest."""
    skipped: tuple[SkippedItem, ...]
    """What it leaves out of the indices that it covers."""


class PartialSet:
    """A folder in which a latent set is made, held by this process.

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
            found = build(LatentPlan, files.read_json(plan_path), str(plan_path))
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

    def begin(self) -> None:
        """Write the plan; from here on the set is incomplete, and can be resumed."""
        files.write_json(self.folder / PROGRESS / "plan.json", self.plan.to_dict())
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
        files.write_json(self.folder / MANIFEST, manifest.to_dict())
        shutil.rmtree(self.folder / PROGRESS)
        for leftover in self.folder.glob(".*.part"):  # of a process that was killed
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
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
            return build(ShardRow, files.read_json(path), str(path))
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
        files.write_json(self._row_path(number), row.to_dict())

    def _row_path(self, number: int) -> Path:
        return self.folder / PROGRESS / f"{Path(shard_name(number)).stem}.json"


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


_SHOWN = ("data", "split", "grid", "dtype", "variants", "num_source", "shard_size", "batch_size")
"""Fields whose values are short enough for a message."""
