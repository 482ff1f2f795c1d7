"""Whether another process writes a folder, told without writing to it."""

import os
from pathlib import Path

from latentlm_core.workflows.findings import Finding, ok, warning


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds ``folder`` (``files.locked``); None where it cannot be told."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(handle)
    return False


def check_lock(folder: Path, command: str) -> Finding:
    """A line about the lock.

    Args:
        folder: of the result.
        command: what writes there.
    """
    locked = is_locked(folder)
    if locked is None:
        return warning("lock", "Not examined, for this system does not tell who holds a file.")
    return ok("lock", f"another process is at work: {command}" if locked else "nobody writes here")
