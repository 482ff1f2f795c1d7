"""How fast a run trains.

    samples_per_second      examples, of all processes
    tokens_per_second       tokens and latents that are fed, padding left out, of all processes
    flops_utilisation       operations that the model needs (``Work``) over those that the devices
                            could do in that time (``training.peak``): MFU
    data_wait_share         of the time, in which there was no batch to go on with

The two in the middle are of tasks that tell their work. What is computed twice
(``trainer.recompute``) counts once. Validation is left out of the time, checkpoints are not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from latentlm_core.training.tasks import Work


@dataclass(slots=True)
class Stretch:
    """What was done in some seconds.

    Attributes:
        seconds: of the clock.
        waited: of these, without a batch.
        samples: examples.
        tokens: tokens and latents.
        flops: operations.
    """

    seconds: float = 0.0
    waited: float = 0.0
    samples: int = 0
    tokens: int = 0
    flops: int = 0

    def add(self, other: "Stretch") -> None:
        """Put another stretch behind this one."""
        self.seconds += other.seconds
        self.waited += other.waited
        self.samples += other.samples
        self.tokens += other.tokens
        self.flops += other.flops

    def figures(self, peak: Callable[[], float]) -> dict[str, float | None]:
        """By their names in the log; ``peak`` is operations a second."""
        if not self.seconds:
            return {}
        speed: dict[str, float | None] = {"samples_per_second": self.samples / self.seconds}
        if self.flops:
            speed["tokens_per_second"] = self.tokens / self.seconds
            speed["flops_utilisation"] = self.flops / self.seconds / peak()
        return speed | {"data_wait_share": self.waited / self.seconds}


class Pace:
    """Speed of training since the last row, and on the whole.

    Args:
        peak: operations a second that the devices of all processes could do.
    """

    def __init__(self, peak: Callable[[], float]) -> None:
        self._peak = peak
        self._whole = Stretch()
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._row = Stretch()
        self._start = time.perf_counter()

    def count(self, samples: int, work: Work) -> None:
        """Add a step of all processes."""
        self._row.add(Stretch(samples=samples, tokens=work.tokens, flops=work.flops))

    def wait(self, seconds: float) -> None:
        """Add time without a batch."""
        self._row.waited += seconds

    def figures(self) -> dict[str, float | None]:
        """Since ``restart``; the whole is all that was asked for so."""
        self._row.seconds = time.perf_counter() - self._start
        self._whole.add(self._row)
        return self._row.figures(self._peak)

    def overall(self) -> dict[str, float | None]:
        """On the whole; nothing where nothing was trained."""
        return self._whole.figures(self._peak)
