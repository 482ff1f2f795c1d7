"""Every reader against hostile input, and the harness against readers that break its promises."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

from latentlm_core.errors import DataError
from tests.hostile import Fault, Ready, Target, run
from tests.hostile_targets import TARGETS

EXAMPLE = Path(__file__).parents[1] / "examples" / "fuzz.py"
CASES = 150
"""Of each target here; ``examples/fuzz.py`` runs 10,000."""


@pytest.mark.parametrize("name", TARGETS)
def test_no_case_gets_anything_but_a_sentence(name, tmp_path):
    ready = Ready(TARGETS[name], tmp_path)
    run(ready, CASES, seed_number=0)
    assert sum(ready.counts.values()) >= CASES
    assert name == "names" or ready.counts["refused"] > CASES / 3


def target_of(use, mebibytes=64):
    return Target(
        "planted", lambda folder: folder, lambda made: 0, lambda made: st.just(1), use, mebibytes
    )


def says(text):
    def use(made, case, folder):
        if case:
            error = DataError("x")
            error.args = (text,)
            raise error

    return use


def allocates(made, case, folder):
    if case:
        bytearray(1 << 30)


def hides_what_it_allocates(made, case, folder):
    try:
        allocates(made, case, folder)
    except MemoryError:
        raise DataError("The file is broken.") from None


def writes(place):
    def use(made, case, folder):
        if case:
            (folder / place).write_text("harm")

    return use


def links_out(made, case, folder):
    if case:
        (folder / "a").symlink_to("../victim.txt")
        (folder / "a").write_text("harm")


def hangs(made, case, folder):
    while case:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("use", "fault"),
    [
        (says("two\nlines"), "no sentence of one line"),
        (says("\x1b[31mred"), "no sentence of one line"),
        (says(""), "no sentence of one line"),
        (allocates, "too much memory"),
        (hides_what_it_allocates, "too much memory, and then said: The file is broken"),
        (writes("../victim.txt"), "outside its folder"),
        (writes("../new"), "outside its folder"),
        (writes("../../made/new"), "outside its folder"),
        (links_out, "outside its folder"),
        (hangs, "longer than"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, monkeypatch, use, fault):
    monkeypatch.setattr("tests.hostile.SECONDS", 0.2)
    ready = Ready(target_of(use), tmp_path)
    with pytest.raises(Fault, match=fault):
        ready.attempt(1)


def test_what_is_no_error_of_ours_goes_through(tmp_path):
    def use(made, case, folder):
        if case:
            raise ValueError("a bug")

    ready = Ready(target_of(use), tmp_path)
    with pytest.raises(ValueError, match="a bug"):
        run(ready, 5, seed_number=0)


def test_a_target_must_read_what_is_sound(tmp_path):
    def use(made, case, folder):
        raise DataError("no")

    with pytest.raises(DataError):
        Ready(target_of(use), tmp_path)


def test_the_example_writes_what_came_of_a_target(tmp_path):
    path = tmp_path / "fuzz.json"
    words = ["--cases", "20", "--seed", "3", "--target", "npz", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["seed"] == 3
    assert found["machine"]
    assert found["targets"]["npz"]["cases"] == 20
    assert found["targets"]["npz"]["failures"] == []


def test_the_same_seed_gives_the_same_cases(tmp_path):
    seen: list[list[bytes]] = []
    for number in (1, 1, 2):
        cases: list[bytes] = []

        def use(made, case, folder, cases=cases):
            cases.append(case)

        target = Target(
            "noted", lambda folder: b"abc", lambda made: b"", lambda made: st.binary(), use
        )
        run(Ready(target, Path(tmp_path / str(len(seen)))), 30, number)
        seen.append(cases)
    assert seen[0] == seen[1] != seen[2]
