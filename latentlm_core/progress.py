"""How the core tells the outside what it is doing, without knowing who listens.

The command line passes a ``Progress`` that draws bars; a notebook may pass its own; by default
nothing is shown.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """One piece of long work."""

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Report ``amount`` more units done and the latest figures (a loss, a rate).

        A run that goes back to a checkpoint reports a negative amount.
        """


class Progress(Protocol):
    """Listener to the core's long work."""

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Bar]:
        """Open a bar of ``total`` units, ``done`` of which are there already (a resumed run)."""

    def note(self, message: str) -> None:
        """Something worth knowing: which model was picked, where a file went."""

    def warn(self, message: str) -> None:
        """Something that may spoil the result."""


class _SilentBar:
    def advance(self, amount: int = 1, **figures: float) -> None:
        pass


class SilentProgress:
    """The listener that hears nothing."""

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Bar]:
        """A bar that is not drawn."""
        return nullcontext(_SilentBar())

    def note(self, message: str) -> None:
        """Drop the message."""

    def warn(self, message: str) -> None:
        """Drop the message."""


SILENT = SilentProgress()
