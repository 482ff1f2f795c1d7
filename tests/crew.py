"""Real processes that know of one another, for the tests of several: started once, used by all."""

import os
import pickle
import signal
import socket
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

MODULES = [
    "torch.distributed.fsdp",
    "torch.utils.checkpoint",
    "latentlm_core.training.trainer",
    "tests.tiny_parallel",
]
"""Imported once, by the process from which the others are forked."""


class Crew:
    """Processes that wait for something to do."""

    def __init__(self, size: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        self._pipes: list[Connection] = []
        for _ in range(size):
            mine, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs,), daemon=True).start()
            self._pipes.append(mine)

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns in each of ``size`` processes, by rank.

        What it raises, in whichever process, is raised here with all tracebacks.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank, pipe in enumerate(self._pipes[:size]):
            pipe.send((rank, size, port, function, args))
        answers = [pickle.loads(pipe.recv_bytes()) for pipe in self._pipes[:size]]
        failures = [f"rank {rank}: {answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]


@cache
def crew() -> Crew:
    """The one crew of a test session."""
    return Crew(4)


def _serve(pipe: Connection) -> None:
    import torch

    from latentlm_core.processes import joined

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it is for the tests
    while True:
        rank, size, port, function, args = pipe.recv()
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            with joined():
                answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
