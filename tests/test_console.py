"""What is printed: results on stdout, progress on stderr, on a terminal and through a pipe."""

import json
import os
import re
import subprocess
import sys

import pytest

from latentlm_cli import console, progress
from latentlm_core.result import Result


@pytest.fixture(autouse=True)
def _only_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


# --- results ---------------------------------------------------------------------------------

RESULT = Result(
    "Samples drawn",
    {
        "samples": 10000,
        "fid": 12.345678,
        "share": {"a": 0.5, "b": float("nan")},
        "flip": True,
        "scales": [1.0, 1.5],
        "lpips": None,
    },
    {"grid": "samples/[x]/grid.png"},
    {"seed": 3},
)


def test_a_piped_result_is_plain_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(RESULT)
    assert capsys.readouterr() == (
        "Samples drawn\n"
        "samples  10,000\n"
        "fid      12.35\n"
        "share.a  0.5\n"
        "share.b  nan\n"
        "flip     yes\n"
        "scales   1, 1.5\n"
        "lpips    -\n"
        "grid     samples/[x]/grid.png\n",
        "",
    )


def test_json_is_one_object_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(RESULT, as_json=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    expected = RESULT.to_dict()
    expected["figures"] |= {"share": {"a": 0.5, "b": None}}
    assert json.loads(out, parse_constant=pytest.fail) == expected


def test_a_dry_run_shows_its_plan_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(RESULT, dry_run=True)
    table, _, plan = capsys.readouterr().out.partition("\n\n")
    assert table.endswith("grid.png")
    assert json.loads(plan) == {"seed": 3}


# --- progress --------------------------------------------------------------------------------


def test_piped_progress_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    listener = progress.listener()
    with listener.bar("train-lm", 1200, "steps", done=1000) as bar:
        listener.note("using [bold]")
        bar.advance(100, loss=0.41234)
        bar.advance(100, rate=2)
        listener.warn("few samples")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "using [bold]"
    number = r"[\d.,e+]+"
    line = (
        rf"train-lm 1,100/1,200 steps  92%  {number}/s  (\d\d:\d\d left|in \d\d:\d\d)  loss 0.4123"
    )
    assert re.fullmatch(line, rest[0])
    assert rest[1] == "Warning: few samples"
    assert re.fullmatch(r"train-lm 1,200/1,200 steps  100%  .*  loss 0.4123  rate 2", rest[2])
    assert len(rest) == 3


def test_short_work_says_one_line_and_none_of_its_bars_divides_by_zero(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.LineProgress().bar("nothing", 0, "images"):
        pass
    assert capsys.readouterr().err.startswith("nothing 0/0 images  0%")


DRAWN = """
from latentlm_cli import console, progress
from latentlm_core.result import Result
listener = progress.listener()
with listener.bar("outer [x]", 2, "steps") as outer:
    with listener.bar("inner", 1, "images") as inner:
        inner.advance()
    listener.note("a note")
    listener.warn("a warning")
    outer.advance(2, loss=0.25)
with listener.bar("second", 3, "steps", done=1) as bar:
    bar.advance(2)
console.show(Result("Done", {"loss": 0.25}), as_json=True)
"""


def test_a_terminal_gets_bars_and_stdout_stays_clean() -> None:
    here, there = os.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    env.pop("RANK", None)
    with subprocess.Popen(
        [sys.executable, "-c", DRAWN], stdout=subprocess.PIPE, stderr=there, env=env
    ) as process:
        os.close(there)
        screen = _read_all(here)
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["figures"] == {"loss": 0.25}
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    for part in ("outer [x]", "2/2", "100%", "loss 0.25", "inner", "3/3", "a note"):
        assert part in text, part
    assert "Warning: a warning" in text
    last = text.rpartition("second")[2]
    assert "outer" not in last, "a finished bar does not come back"


def _read_all(descriptor: int) -> str:
    """Everything that is written to a terminal until its other end closes."""
    chunks = []
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(descriptor)
    return b"".join(chunks).decode()


# --- ranks -----------------------------------------------------------------------------------


def test_other_ranks_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.show(RESULT)
    listener = progress.listener()
    with listener.bar("work", 2, "steps") as bar:
        bar.advance()
    listener.note("x")
    listener.warn("x")
    assert capsys.readouterr() == ("", "")
