"""Ctrl-C and SIGTERM as a wish that is granted where the training state is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the process to stop.

    Attributes:
        urgent: asked twice; the second time raises at once and nothing should delay the exit.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self.urgent = False

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: remember the first signal, obey the second at once."""
        self.urgent = self._signal is not None
        self._signal = number
        if self.urgent:
            self.obey()

    def obey(self) -> None:
        """Do what the signal asks for, if there was one.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came; the code is the shell's 128 + 15.
        """
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Hold back SIGINT and SIGTERM inside the block; whoever runs it asks ``obey`` when it suits.

    Python delivers signals to the main thread alone, so in other threads nothing is held back.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
