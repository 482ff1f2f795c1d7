"""What hostile input may do to a reader: nothing, or one sentence.

A target knows how to make something sound, how to spoil it, and how to read it as a user would.
``attempt`` reads one case and holds it to everything that is promised: it returns or raises a
``LatentLMError`` of one line, soon, with little memory, and touches nothing outside its folder.
"""

import mmap
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from latentlm_core.errors import LatentLMError

SECONDS = 10.0
"""A case that takes longer is a hang."""
MEBIBYTES = 192
"""A case may map this much beyond what its target allows for."""


class Fault(BaseException):
    """A promise that a reader broke."""


@dataclass(frozen=True)
class Target:
    """A reader and what it is fed with.

    Attributes:
        name: what it is called.
        prepare: makes in an empty folder what cases are made of, once.
        sound: a case that is read, of what ``prepare`` returned.
        cases: strategy of the cases, likewise.
        use: reads a case inside an empty folder of its own.
        mebibytes: that a case may take, for its size justifies them.
    """

    name: str
    prepare: Callable[[Path], Any]
    sound: Callable[[Any], Any]
    cases: Callable[[Any], st.SearchStrategy[Any]]
    use: Callable[[Any, Any, Path], None]
    mebibytes: int = MEBIBYTES


class Ready:
    """A target with its folders.

    Args:
        target: what is attempted.
        root: an empty folder: ``made`` is the target's, ``world/case`` that of each case.

    Attributes:
        counts: how many cases were read and how many refused.
    """

    def __init__(self, target: Target, root: Path) -> None:
        self.target = target
        self.counts = {"read": 0, "refused": 0}
        self.made = target.prepare(_emptied(root / "made"))
        self._root, self._world = root, root / "world"
        _emptied(self._world)
        (self._world / "victim.txt").write_text("as it was")
        target.use(self.made, target.sound(self.made), _emptied(self._world / "case"))
        self._before = snapshot(root)

    def attempt(self, case: Any) -> Literal["read", "refused"]:
        """Read a case.

        Raises:
            Fault: the reader broke a promise.
        """
        folder = _emptied(self._world / "case")
        try:
            with _unsynced(), bounded_time(SECONDS), bounded_memory(self.target.mebibytes):
                outcome = self._use(case, folder)
        finally:
            shutil.rmtree(folder)
        if snapshot(self._root) != self._before:
            raise Fault(f"something outside its folder was touched: {snapshot(self._root)}")
        self.counts[outcome] += 1
        return outcome

    def _use(self, case: Any, folder: Path) -> Literal["read", "refused"]:
        try:
            self.target.use(self.made, case, folder)
        except LatentLMError as error:
            check_sentence(error)
            return "refused"
        except MemoryError as error:
            raise Fault("it took too much memory") from error
        return "read"


def check_sentence(error: LatentLMError) -> None:
    """Hold an error to one line that a terminal can show."""
    text = str(error)
    if not text or not text.isprintable() or len(text) > 5000:
        raise Fault(f"no sentence of one line: {text!r}")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            raise Fault(f"it took too much memory, and then said: {text}")
        cause = cause.__cause__ or cause.__context__


def refusals(readers: Sequence[Callable[[], Any]]) -> list[LatentLMError]:
    """Call all of them, and hold what they raise to one line each."""
    raised = []
    for reader in readers:
        try:
            reader()
        except LatentLMError as error:
            check_sentence(error)
            raised.append(error)
    return raised


def in_turn(readers: Sequence[Callable[[], Any]]) -> None:
    """Call all of them, and then raise the first refusal."""
    for error in refusals(readers):
        raise error


def run(ready: Ready, cases: int, seed_number: int) -> None:
    """Attempt so many cases, the same ones for the same seed; a shrunken one fails."""
    derived = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )

    @seed(seed_number)
    @derived
    @given(ready.target.cases(ready.made))
    def each(case: Any) -> None:
        ready.attempt(case)

    each()


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that lies under ``root``, without the case's own folder."""
    found = {}
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if not name.startswith("world/case/") and not path.is_dir():
            status = path.lstat()
            found[name] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """Break off what takes longer."""

    def ring(*_: object) -> None:
        raise Fault(f"it took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory(mebibytes: int) -> Iterator[None]:
    """Let this process map only so much more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + (mebibytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _unsynced() -> Iterator[None]:
    """Nothing of a case need outlive a power cut."""
    with mock.patch("os.fsync"):
        yield


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
