"""Ctrl-C and SIGTERM as a wish that is granted where the training state is whole.

Of several processes it is enough that one is asked. Torchrun and Slurm pass a signal on that has
reached the processes already, so to them a second one means nothing; torchrun kills what has not
ended after 30 seconds.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

from latentlm_core.processes import ALONE, Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked the process, or one of its companions, to stop.

    Args:
        processes: that stop together.

    Attributes:
        urgent: one process alone was asked twice; the second time raises at once and nothing should
            delay the exit.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._signal: int | None = None
        self.urgent = False

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: remember the first signal, obey the second at once."""
        self.urgent = self._signal is not None and self._processes.size == 1
        self._signal = number
        if self.urgent:
            _stop(number)

    def obey(self) -> None:
        """Do what the signal asks for, if one process got one; every process calls this.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came; the code is the shell's 128 + 15.
        """
        asked = torch.tensor([self._signal == number for number in SIGNALS]).int()
        for number, times in zip(SIGNALS, self._processes.sum(asked).tolist(), strict=True):
            if times:
                _stop(number)


@contextmanager
def deferred_signals(processes: Processes = ALONE) -> Iterator[StopRequest]:
    """Hold back SIGINT and SIGTERM inside the block; whoever runs it asks ``obey`` when it suits.

    Python delivers signals to the main thread alone, so in other threads nothing is held back.
    """
    request = StopRequest(processes)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
