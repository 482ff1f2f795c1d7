"""A folder of samples that belongs to one set of settings.

Several processes fill it together: the main one holds and claims it, looks at what is there, and
writes what stands beside the samples; each writes the samples of its own batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentlm_core.errors import ArtifactError
from latentlm_core.files import locked, read_json, write_json
from latentlm_core.processes import Processes
from latentlm_core.progress import Bar, Progress
from latentlm_core.sampling import SamplerConfig, TextSamplerConfig

DEFAULTS: Mapping[str, Any] = {
    "dtype": "float32",
    "sampler": SamplerConfig().to_dict(),
    "text_sampler": TextSamplerConfig().to_dict(),
}
"""Settings that earlier versions did not write, or not in full: what they were."""
UNCOMPARED = frozenset(("mode",))
"""Settings that change no sample by more than rounding."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that are drawn together.

    Attributes:
        indices: all of them.
        missing: those that are not there yet.
    """

    indices: range
    missing: frozenset[int]

    def parts(self, size: int) -> Iterator["Batch"]:
        """Batches of at most ``size`` that it falls into, where something is missing."""
        for start in range(0, len(self.indices), size):
            indices = self.indices[start : start + size]
            missing = self.missing.intersection(indices)
            if missing:
                yield Batch(indices, missing)


class ClaimedFolder:
    """Samples of one model, seed and setting; of other settings it takes none.

    Args:
        path: the folder.
        settings: JSON values that decide the samples.
    """

    suffix = ".png"
    """Of the samples' files."""
    others: tuple[str, ...] = ()
    """Suffixes of what is written beside them."""
    unit = "samples"
    """What a bar counts."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings

    @contextmanager
    def held(self, processes: Processes) -> Iterator[None]:
        """Inside the block the folder is claimed, and the main process's.

        Raises:
            BusyError: another command is writing it.
            ArtifactError: as ``claim``, or this process found another model than the main one.
        """
        with processes.in_main(locked(self.path)):
            processes.once(self.claim)
            if processes.agree(self.settings) != self.settings:
                raise ArtifactError(
                    f"The main process has other settings of {self.path}: the processes must see "
                    "the same models and data."
                )
            yield

    def claim(self) -> None:
        """Take the folder for these settings.

        Raises:
            ArtifactError: it holds other samples, or files of somebody else.
        """
        path = self.path / "settings.json"
        if path.exists():
            self._compare(read_json(path))
        else:
            self._refuse_strangers()
        write_json(path, self.settings)

    def file(self, index: int) -> Path:
        """The file of a sample."""
        return self.path / f"{index:06d}{self.suffix}"

    def missing(self, count: int) -> list[int]:
        """Which of the first ``count`` samples are not there yet."""
        return [index for index in range(count) if not self.file(index).is_file()]

    @contextmanager
    def unmade(
        self, count: int, size: int, processes: Processes, told: Progress, label: str
    ) -> Iterator[tuple[Iterator[Batch], Bar]]:
        """This process's batches of the first ``count`` samples, and a bar that counts samples.

        The block ends when all are made. A batch has fixed places, so a sample is drawn beside
        the same ones however often the command was interrupted and whoever draws it.

        Args:
            count: samples in all.
            size: of a batch.
            processes: who take the batches in turn.
            told: hears of the samples.
            label: of the bar.
        """
        missing = processes.once(lambda: self.missing(count))
        wanted = _batches(missing, count, size)
        with processes.bar(told, label, count, self.unit, count - len(missing)) as bar:
            yield processes.own(wanted), bar

    def _refuse_strangers(self) -> None:
        for suffix in (self.suffix, *self.others):
            if any(self.path.glob(f"*{suffix}")):
                raise ArtifactError(
                    f"{self.path} holds {suffix} files that are not ours.",
                    hint="Use another --out.",
                )

    def _compare(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise ArtifactError(f"{self.path / 'settings.json'} is not an object.")
        defaults = {name: value for name, value in DEFAULTS.items() if name in self.settings}
        found = _completed(found, defaults)
        names = sorted((found.keys() | self.settings.keys()) - UNCOMPARED)
        differing = [name for name in names if found.get(name) != self.settings.get(name)]
        if differing:
            raise ArtifactError(
                f"{self.path} holds samples of other settings ({', '.join(differing)} differ in "
                "its settings.json).",
                hint="Use another --out.",
            )


def _completed(found: Any, defaults: Any) -> Any:
    """What was found, with the defaults of what its objects lack."""
    if not isinstance(found, dict) or not isinstance(defaults, Mapping):
        return found
    known = {name: _completed(value, defaults.get(name)) for name, value in found.items()}
    return {**defaults, **known}


def _batches(missing: Sequence[int], count: int, size: int) -> list[Batch]:
    """The batches of ``size`` places in which something is missing."""
    wanted: dict[int, list[int]] = {}
    for index in missing:
        wanted.setdefault(index // size * size, []).append(index)
    return [
        Batch(range(start, min(start + size, count)), frozenset(own))
        for start, own in wanted.items()
    ]
