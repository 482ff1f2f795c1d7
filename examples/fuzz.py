"""Feed every reader with hostile input: thousands of spoiled files, names and command lines.

    python examples/fuzz.py [--cases 10000] [--target NAME ...] [--seed 0] [--json FILE]

Each target of ``tests/hostile_targets.py`` runs in a process of its own, so that one that is killed
is a result like another. A case may return or raise one sentence; it may not raise anything else,
take longer than ten seconds, take much memory, or touch a file outside of its folder. The same seed
gives the same cases. Counts, seconds and failures go to results/fuzz.json or to FILE.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the targets belong to the tests, which no package holds

SEEDS = 1000
"""Rounds at most: a round ends before its cases are done where it has found a fault."""


def main() -> int:
    """Run the targets and write what came of them."""
    from latentlm_core.files import write_json
    from latentlm_core.runtime import machine, versions
    from tests.hostile_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "examples/results/fuzz.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.target or TARGETS:
        results[name] = in_process(name, options.cases, options.seed)
        told = {key: value for key, value in results[name].items() if key != "failures"}
        print(name, told, flush=True)
        for failure in results[name]["failures"]:
            print(f"  {failure}", flush=True)
        about = {"seed": options.seed, "machine": machine(), "versions": versions()}
        write_json(options.json, about | {"targets": results})
    return int(any(result["failures"] for result in results.values()))


def in_process(name: str, cases: int, seed: int) -> dict[str, Any]:
    """What came of a target; a process that ends without a word is a failure too."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=attempt_all, args=(name, cases, seed, theirs))
    process.start()
    theirs.close()
    try:
        result: dict[str, Any] = ours.recv()
    except EOFError:
        result = {"cases": 0, "failures": ["the process was killed"]}
    process.join()
    if process.exitcode:
        result["failures"].append(f"the process ended with {process.exitcode}")
    return result


def attempt_all(name: str, cases: int, seed: int, results: Connection) -> None:
    """Attempt so many cases of a target, in rounds, and go on after a fault."""
    from tests.hostile import Fault, Ready, run
    from tests.hostile_targets import TARGETS

    start = time.perf_counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as root, silenced():
        ready = Ready(TARGETS[name], Path(root))
        for number in range(seed, seed + SEEDS):
            left = cases - sum(ready.counts.values())
            if left <= 0:
                break
            try:
                run(ready, left, number)
            except (Exception, BaseExceptionGroup, Fault) as fault:
                failures += described(fault)
    seconds = round(time.perf_counter() - start, 1)
    total = sum(ready.counts.values())
    results.send({"cases": total, **ready.counts, "seconds": seconds, "failures": failures})


def described(fault: BaseException) -> list[str]:
    """Each fault with its smallest case."""
    faults = fault.exceptions if isinstance(fault, BaseExceptionGroup) else [fault]
    return [
        f"{type(one).__name__}: {one!s:.300} <- {' '.join(getattr(one, '__notes__', ()))!s:.600}"
        for one in faults
    ]


@contextlib.contextmanager
def silenced() -> Any:
    """Libraries of C complain of what they decode on the standard error of the process."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
