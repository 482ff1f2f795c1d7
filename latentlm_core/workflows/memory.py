"""Batches that do not fit into memory: what running out looks like, and what to do about it.

Nobody knows beforehand how much a batch takes in all; what its cache of keys and values takes is
known. A batch that certainly does not fit is not begun, and one that turns out not to is halved:
samples do not depend on their batch, so what was drawn before stays and the rest is drawn in
smaller ones.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch

from latentlm_core.artifacts import Generator
from latentlm_core.errors import LatentLMError
from latentlm_core.models.dit import DiT
from latentlm_core.progress import Progress
from latentlm_core.runtime import machine

E = TypeVar("E")
T = TypeVar("T")

USABLE = 0.9
"""Share of the free memory that is counted on."""
NO_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
"""What messages hold where PyTorch has no exception of its own."""
MEMORY_INFO = Path("/proc/meminfo")


class Fitting(Generic[E]):
    """An engine for as many samples at once as fit into memory.

    Args:
        make: an engine for so many at once.
        size: at once, as asked.
        bytes_each: what each of them takes at least.
        device: whose memory it is.
        progress: hears that the size is too large, and which one is not.
    """

    def __init__(
        self,
        make: Callable[[int], E],
        size: int,
        bytes_each: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.size = size
        self._make, self._device, self._progress = make, device, progress
        free = free_bytes(device)
        while free is not None and self.size > 1 and self.size * bytes_each > USABLE * free:
            self.size //= 2
        if self.size < size:
            self._tell(size)
        self.engine = make(self.size)

    def run(self, work: Callable[[E, int], T]) -> T:
        """What ``work`` returns of the engine and the size; with smaller ones if it does not fit.

        Args:
            work: begun again after it ran out of memory.

        Raises:
            LatentLMError: not even one sample fits.
        """
        while True:
            try:
                return work(self.engine, self.size)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
            self._shrink()  # out here, where the error no longer holds what was drawn with

    def _shrink(self) -> None:
        if self.size == 1:
            raise LatentLMError(
                f"Not even a single sample fits into the memory of {machine(self._device)}.",
                hint="Use another --device, or --dtype bfloat16, which takes half of it.",
            )
        before, self.size = self.size, self.size // 2
        self._tell(before)
        del self.engine
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.engine = self._make(self.size)

    def _tell(self, before: int) -> None:
        self._progress.warn(
            f"A batch of {before} does not fit into the memory of {machine(self._device)}, so "
            f"samples are drawn {self.size} at a time, as with --batch-size {self.size}."
        )


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in NO_MEMORY)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None where the system does not tell (Linux does)."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type != "cpu" or not MEMORY_INFO.is_file():
        return None
    fields = dict(line.split(":") for line in MEMORY_INFO.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def cache_bytes(model: Generator, num_positions: int) -> int:
    """Bytes of the keys and values of a row; a DiT keeps none."""
    if isinstance(model, DiT):
        return 0
    config, weight = model.config.backbone, model.latent_embedding.weight
    numbers = 2 * config.num_layers * config.kv_heads * config.head_dim * num_positions
    return numbers * weight.itemsize
