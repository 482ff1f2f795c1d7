"""Kill every command at random moments, start it again until it ends, compare what is left.

The pipeline train-vae, tokenize, train-lm, sample runs once undisturbed. Then it runs again and
again, in a new folder each time, with every command killed at moments drawn uniformly over the time
that it takes, and started again until it ends. Of each pass every file must be what the undisturbed
one left, byte for byte but for what a clock decides, and nothing else may lie there.

    SIGKILL          the four commands
    SIGTERM, SIGINT  the same; who trains saves first, and the exit code is 143 or 130
    pairs            SIGKILL to one or both of two processes that train together
    races            two processes start the same command within 50 ms: one works, one says so

    python examples/kill_harness.py [--kills 100] [--seed 0] [--stage train-lm] [--json FILE] FOLDER
"""

import argparse
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from disturbed import (
    PATIENCE,
    RESULTS,
    STAGES,
    Start,
    contents,
    last_only,
    make_dots,
    moment,
    prepare,
)

from latentlm_core.files import write_json
from latentlm_core.runtime import machine, versions

SENTENCE = "Another process is writing"
MAX_STARTS = 60
SLOWER = 1.15
"""How much longer each start of a command may live than the one before it: the first may have been
measured on a machine with nothing else to do."""
TORCHRUN_PATIENCE = 30.0
"""Seconds after which torchrun kills a process that was asked to stop."""


@dataclass(slots=True)
class Harness:
    """The folders, the dice and the counts.

    Attributes:
        root: of everything.
        dice: decide when what is disturbed.
        fresh: share of disturbed starts that are the real command in a fresh interpreter.
        hits: (command, what was done to it) => where it was hit => how often.
        faults: sentences about what should not be.
        identical: results that were what they should be, by command.
        durations: seconds of a start that is not disturbed, by command and whether it is fresh, as
            they were lately.
        expected: what the undisturbed commands left.
    """

    root: Path
    dice: random.Random
    fresh: float
    hits: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)
    identical: Counter[str] = field(default_factory=Counter)
    durations: dict[tuple[str, bool], float] = field(default_factory=dict)
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    _num_starts: int = 0

    def start(self, stage: str, home: Path, fresh: bool = False, **extra: str) -> Start:
        """Start a command in a workspace, with ``extra`` environment variables."""
        self._num_starts += 1
        log = self.root / "logs" / f"{self._num_starts:05d}.txt"
        return Start.of(stage, home, log, fresh, extra)

    def undisturbed(self, home: Path, fresh: bool) -> None:
        """Run the pipeline once, and measure how long its commands take."""
        home.mkdir()
        for stage in STAGES:
            begun = time.monotonic()
            start = self.start(stage, home, fresh)
            if not start.wait(PATIENCE) or start.code:
                raise SystemExit(f"{stage} does not work undisturbed: {start.text()}")
            self.durations[stage, fresh] = time.monotonic() - begun
            self.compare(stage, home)

    def disturbed(self, home: Path, stages: Sequence[str], numbers: Sequence[int]) -> None:
        """Run the pipeline once, with one of these signals to each start of these commands."""
        home.mkdir()
        for stage in STAGES:
            for attempt in range(MAX_STARTS):
                is_target = stage in stages
                fresh = is_target and self.dice.random() < self.fresh
                expected, begun = self.durations[stage, fresh], time.monotonic()
                start = self.start(stage, home, fresh)
                longest = expected * SLOWER**attempt
                if start.wait(self.dice.uniform(0, longest) if is_target else PATIENCE):
                    if attempt == 0:  # all of the work, on a machine as busy as it is now
                        self.durations[stage, fresh] = (expected + time.monotonic() - begun) / 2
                    break
                number = self.dice.choice(numbers)
                start.send(number)
                if start.code == 0:
                    break
                self._note(stage, home, start, number, fresh)
            if start.code:
                self.faults.append(f"{home.name} {stage} ends with {start.code}: {start.text()}")
            self.compare(stage, home, of_last=signal.SIGKILL not in numbers)

    def compare(self, stage: str, home: Path, kind: str = "", of_last: bool = False) -> None:
        """Compare what a command left with what the first one of its kind left.

        Args:
            stage: the command.
            home: its workspace.
            kind: of the command; by default ``stage``.
            of_last: of checkpoints compare the last one alone.
        """
        found = contents(home / RESULTS[stage])
        expected = self.expected.setdefault(kind or stage, found)
        if of_last:
            found, expected = last_only(found), last_only(expected)
        names = sorted(found.keys() | expected.keys())
        differing = [name for name in names if found.get(name) != expected.get(name)]
        if differing:
            self.faults.append(f"{home.name} {stage} differs: {', '.join(differing[:8])}")
        self.identical[kind or stage] += not differing

    def _note(self, stage: str, home: Path, start: Start, number: int, fresh: bool) -> None:
        """Account for a signal that ended a command.

        While a fresh interpreter imports the command line, signals are Python's to answer.
        """
        name, place = signal.Signals(number).name, moment(stage, home / RESULTS[stage], start)
        self.hits[stage, name][place] += 1
        said, steps = start.text(), home / RESULTS[stage] / "checkpoints"
        saved = re.search(r"Stopped after step (\d+)", said)
        is_told = "Traceback" not in said or (fresh and place == "starting")
        if start.code != 128 + number or not is_told:
            self.faults.append(f"{home.name} {stage} {name} {place} => {start.code}: {said}")
        elif saved and not (steps / f"step-{int(saved[1]):08d}" / "state.json").is_file():
            self.faults.append(f"{home.name} {stage} has no checkpoint: {saved[0]}")


def run_signals(
    harness: Harness, stages: Sequence[str], numbers: Sequence[int], count: int
) -> None:
    """Disturb pipelines until each of the commands was sent each signal ``count`` times."""
    names = [signal.Signals(number).name for number in numbers]
    done = 0
    while any(harness.hits[stage, name].total() < count for stage in stages for name in names):
        home = harness.root / f"{'-'.join(names)}-{done}"
        before = len(harness.faults)
        harness.disturbed(home, stages, numbers)
        if len(harness.faults) == before:
            shutil.rmtree(home)
        done += 1


def run_pairs(harness: Harness, count: int) -> None:
    """Train with two processes, one or both of which are killed, ``count`` times in all."""
    if not count:
        return
    latents, hits = harness.root / "undisturbed/latents", harness.hits["train-lm", "pair"]
    _run_pair(harness, shutil.copytree(latents, harness.root / "pair/latents").parents[0], False)
    while hits.total() < count:
        home = harness.root / f"pair-{hits.total()}"
        shutil.copytree(latents, home / "latents")
        _run_pair(harness, home, True)


def _run_pair(harness: Harness, home: Path, is_target: bool) -> None:
    stage, key = "train-lm", ("train-lm of two processes", False)
    for attempt in range(MAX_STARTS):
        begun, common = time.monotonic(), _common_variables()
        pair = [harness.start(stage, home, **common, **_variables(rank)) for rank in (0, 1)]
        seconds = PATIENCE
        if is_target:
            seconds = harness.dice.uniform(0, harness.durations[key] * SLOWER**attempt)
        if all(start.wait(begun + seconds - time.monotonic()) for start in pair):
            break
        ranks = harness.dice.choice([(0,), (1,), (0, 1)])
        for rank in ranks:
            pair[rank].send(signal.SIGKILL)
        place = moment(stage, home / RESULTS[stage], pair[0])
        harness.hits[stage, "pair"][f"rank {' and '.join(map(str, ranks))}, {place}"] += 1
        for start in pair:
            _end_like_torchrun(harness, start)
    if any(start.code for start in pair):
        harness.faults.append(f"{home.name} does not end: {[start.text() for start in pair]}")
    harness.durations.setdefault(key, time.monotonic() - begun)
    harness.compare(stage, home, kind=key[0])


def _end_like_torchrun(harness: Harness, left: Start) -> None:
    """Ask a process whose companion has ended to stop, and kill it where it does not."""
    if left.code is None:
        os.kill(left.pid, signal.SIGTERM)
        if not left.wait(TORCHRUN_PATIENCE):
            left.send(signal.SIGKILL)
        if "Traceback" in left.text():
            harness.faults.append(f"who was left over says: {left.text()}")


def _variables(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _common_variables() -> dict[str, str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}
    return address | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def run_races(harness: Harness, stages: Sequence[str], count: int) -> None:
    """Start each command twice at nearly the same moment, ``count`` times."""
    for number in range(count):
        home = harness.root / f"race-{number}"
        home.mkdir()
        for stage in STAGES:
            if stage not in stages:
                shutil.copytree(
                    harness.root / "undisturbed" / RESULTS[stage], home / RESULTS[stage]
                )
                continue
            both = [harness.start(stage, home)]
            time.sleep(harness.dice.uniform(0, 0.05))
            both.append(harness.start(stage, home))
            ended = [start.wait(PATIENCE) and start.code for start in both]
            said = [start.text() for start in both if start.code]
            is_right = sorted(ended) == [0, 1] and SENTENCE in said[0]
            is_right &= all("Traceback" not in start.text() for start in both)
            harness.hits[stage, "race"]["one works" if is_right else "otherwise"] += 1
            if not is_right:
                harness.faults.append(f"{home.name} {stage} {ended}: {said}")
            harness.compare(stage, home)
        shutil.rmtree(home)


def figures(harness: Harness) -> dict[str, Any]:
    """What came of it, as plain values."""
    return {
        "hits": {
            f"{stage} {what}": {"total": places.total(), **dict(places.most_common())}
            for (stage, what), places in harness.hits.items()
            if places
        },
        "identical": dict(harness.identical),
        "faults": harness.faults,
        "expected_seconds": {
            stage + (", fresh" if fresh else ""): round(seconds, 2)
            for (stage, fresh), seconds in harness.durations.items()
        },
    }


def main() -> None:
    """Run all, print and write the figures, exit 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, over all commands")
    parser.add_argument("--signals", type=int, default=10, help="SIGTERMs, and SIGINTs, a command")
    parser.add_argument("--pairs", type=int, default=10, help="kills of two processes")
    parser.add_argument("--races", type=int, default=20, help="double starts of a command")
    parser.add_argument("--images", type=int, default=8400, help="4,096 make a shard")
    parser.add_argument("--fresh", type=float, default=0.125, help="share of fresh interpreters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES, action="append", help="of several; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prepare()
    begun, stages = time.monotonic(), options.stage or list(STAGES)
    harness = Harness(options.folder.resolve(), random.Random(options.seed), options.fresh)
    (harness.root / "logs").mkdir(parents=True)
    make_dots(harness.root / "dots", options.images)
    make_dots(harness.root / "few-dots", 200)
    harness.undisturbed(harness.root / "undisturbed", fresh=options.fresh > 0)
    if options.fresh:
        harness.undisturbed(harness.root / "forked", fresh=False)
    kills = -(-options.kills // len(stages))
    for run in (
        partial(run_signals, harness, stages, [signal.SIGKILL], kills),
        partial(run_signals, harness, stages, [signal.SIGTERM, signal.SIGINT], options.signals),
        partial(run_races, harness, stages, options.races),
        partial(run_pairs, harness, options.pairs),
    ):
        run()
        found = figures(harness)
        if options.json:
            about = {"machine": machine(), "versions": versions(), "seed": options.seed}
            write_json(options.json, {**about, "seconds": round(time.monotonic() - begun), **found})
    for name, value in found.items():
        print(name, *(value.items() if isinstance(value, Mapping) else value), sep="\n    ")
    sys.exit(bool(harness.faults))


if __name__ == "__main__":
    main()
