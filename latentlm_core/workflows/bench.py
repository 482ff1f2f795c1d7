"""What the benchmarks share: taking turns, spread, memory, ceilings, and what a report names.

Notable choices: two ways of one thing are measured in turns within one run, so that a load that
comes and goes meets both, and their ratio is what a figure is. What a machine can reach is measured
in the same run as well: a large product for its arithmetic, a large copy for its memory.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from latentlm_core.errors import ConfigError, LatentLMError
from latentlm_core.progress import Progress
from latentlm_core.result import Result
from latentlm_core.runtime import machine, synchronize, versions
from latentlm_core.training.peak import measured_flops
from latentlm_core.workflows.memory import lacks_memory

T = TypeVar("T")

BUSY = 0.5
"""Processes that run before we begin, as a share of the cores, from which a machine is busy."""
COPY_BYTES = {"cuda": 1 << 30}
"""Of the copy that is measured, and on other devices:"""
OTHER_COPY_BYTES = 1 << 26
COPIES = 10
PROCESS = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Timing:
    """How long each repeat took.

    Attributes:
        seconds: of each.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def rates(self, count: float) -> dict[str, float]:
        """Per second, of ``count`` things a repeat: median, min and max."""
        seconds = {"median": self.median, "min": max(self.seconds), "max": min(self.seconds)}
        return {name: round(count / value, 3) for name, value in seconds.items()}


def take_turns(
    works: Sequence[Callable[[], Any]], repeats: int, warm_up: int, device: torch.device
) -> list[Timing]:
    """Time each work, in turns, after some rounds that do not count.

    Args:
        works: what to time.
        repeats: rounds that count.
        warm_up: rounds before.
        device: that is waited for before the clock is read.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(warm_up + repeats):
        for work, own in zip(works, seconds, strict=True):
            taken = timed(work, device)
            if turn >= warm_up:
                own.append(taken)
    return [Timing(tuple(own)) for own in seconds]


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a work takes, the device's part included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


class Memory:
    """The highest use of memory since this was made, or since ``restart``.

    Args:
        device: a GPU, whose own allocator tells of all that lies there, or the CPU, where it is how
            much the resident size of the process grew.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            PROCESS.joinpath("clear_refs").write_text("5")
            self._before = _resident("VmRSS")
        except OSError:
            self._before = None

    @property
    def peak_megabytes(self) -> float | None:
        """10^6 bytes; None where the system does not tell of a process (Linux does)."""
        if self._device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self._device) / 1e6, 1)
        if self._before is None:
            return None
        return round((_resident("VmHWM") - self._before) / 1e6, 1)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device reached in this run.

    Attributes:
        flops: floating-point operations a second, of a large product.
        bytes: bytes a second, read and written by a large copy.
    """

    flops: float
    bytes: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Self:
        """Of the fastest of some repeats.

        Args:
            device: which.
            dtype: of the product.
        """
        size = COPY_BYTES.get(device.type, OTHER_COPY_BYTES)
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        (copy,) = take_turns((lambda: target.copy_(source),), COPIES, 2, device)
        return cls(measured_flops(device, dtype), 2 * size / min(copy.seconds))

    def to_dict(self) -> dict[str, float]:
        """JSON values."""
        return {
            "teraflops": round(self.flops / 1e12, 3),
            "gigabytes_per_second": round(self.bytes / 1e9, 2),
        }


class Conditions:
    """Under what a benchmark ran.

    Args:
        device: where.
        options: that the user may have given.
        progress: hears that the machine is busy.
    """

    def __init__(
        self, device: torch.device, options: Mapping[str, Any], progress: Progress
    ) -> None:
        self.device = device
        self._options = dict(options)
        self._load = _load()
        self.is_busy = self._load > BUSY * (os.cpu_count() or 1)
        if self.is_busy:
            progress.warn(
                f"The machine is busy: {self._load:g} processes run on {os.cpu_count()} cores, so "
                "go by the ratios."
            )

    def result(
        self,
        title: str,
        figures: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        **details: Any,
    ) -> Result:
        """The answer.

        Args:
            title: a few words.
            figures: for a person.
            rows: what was measured.
            details: more of it.
        """
        named = machine(self.device)
        load = {"start": self._load, "end": _load()}
        shown = {"machine": named + (", busy" if self.is_busy else ""), "load": load["start"]}
        return Result(
            title,
            {**figures, **shown},
            details={
                "machine": named,
                "versions": versions(),
                "options": self._options,
                "load": load,
                "cores": os.cpu_count(),
                "busy": self.is_busy,
                "rows": list(rows),
                **details,
            },
        )


def each_batch(
    batches: Sequence[int],
    device: torch.device,
    measure: Callable[[int], T],
    progress: Progress,
) -> dict[int, T]:
    """Measure from the smallest batch on; in place of one that does not fit, the half of it.

    Args:
        batches: as asked.
        device: whose memory it is.
        measure: of a batch.
        progress: hears that one does not fit, and which one does.

    Raises:
        LatentLMError: not even a batch of 1 fits.
    """
    measured: dict[int, T] = {}
    for batch in sorted(set(batches)):
        size = batch
        while size and size not in measured:
            try:
                measured[size] = measure(size)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                size //= 2
            _release(device)  # out here, where no error holds what was measured with
        told = f"A batch of {batch} does not fit into the memory of {machine(device)}"
        if not size:
            raise LatentLMError(f"{told}, and neither does any smaller one.")
        if size < batch:
            progress.warn(f"{told}; {size} does.")
            break
    return measured


def require_counts(batches: Sequence[int], repeats: int, warm_up: int, steps: int = 1) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: there is no batch, or a number is too small.
    """
    if not batches or min(batches) < 1:
        raise ConfigError("--batch is one number or more, each at least 1, as in 1,64.")
    if min(repeats, steps) < 1 or warm_up < 0:
        raise ConfigError("--repeats and --steps are at least 1, and --warm-up at least 0.")


def _release(device: torch.device) -> None:
    """Give back what nobody holds, cycles included, so that it does not count as the next one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _resident(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = PROCESS.joinpath("status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) * 1024


def _load() -> float:
    return round(os.getloadavg()[0], 2)
