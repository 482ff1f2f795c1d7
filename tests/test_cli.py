"""The command line as a user meets it: help, exit codes, interruptions."""

import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from latentlm_cli import bench, evaluate, sample, tokenize
from latentlm_cli.app import Application, app
from latentlm_core.errors import ConfigError
from latentlm_core.result import Result

COMMANDS = (
    *("demo", "doctor", "train-vae", "tokenize", "train-lm", "sample", "push"),
    *("eval fid", "eval is", "eval kid", "eval precision-recall"),
    *("eval recon", "eval sweep", "eval stats", "eval wer", "eval sim", "eval drift"),
    *("eval ppl", "eval t2i", "eval caption", "eval vqa"),
    *("bench sample", "bench train", "bench tokenize", "bench load"),
)
runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100", "RANK": None})


@pytest.fixture(autouse=True)
def _empty_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENTLM_HOME", raising=False)
    monkeypatch.delenv("LATENTLM_DEBUG", raising=False)


# --- help ------------------------------------------------------------------------------------


def test_every_command_is_in_the_help_of_its_group() -> None:
    known = {
        *(str(c.name or c.callback.__name__).replace("_", "-") for c in app.registered_commands),
        *(f"eval {c.name or c.callback.__name__}" for c in evaluate.app.registered_commands),
        *(f"bench {c.name or c.callback.__name__}" for c in bench.app.registered_commands),
    }
    assert known == set(COMMANDS)
    for command in COMMANDS:
        *group, name = command.split()
        assert re.search(rf"\b{name} ", runner.invoke(app, [*group, "--help"]).stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_an_example_that_parses(command: str) -> None:
    shown = runner.invoke(app, f"{command} -h")
    assert shown.exit_code == 0
    assert shown.stderr == ""
    head, _, examples = shown.stdout.partition("Example")
    assert len(head.split("Usage")[1].splitlines()) > 3
    lines = [line.strip() for line in examples.splitlines() if f"latentlm {command}" in line]
    assert lines, "an example names its own command"
    for line in lines:
        parsed = runner.invoke(app, f"{line.removeprefix('latentlm ')} --help")
        assert parsed.exit_code == 0, line


def test_every_option_is_explained() -> None:
    from typer.main import get_command

    group = get_command(app)
    tops = group.commands.values()
    leaves = [leaf for top in tops for leaf in getattr(top, "commands", {"": top}).values()]
    assert len(leaves) == len(COMMANDS)
    silent = [f"{c.name} {p.name}" for c in leaves for p in c.params if not getattr(p, "help", "")]
    assert silent == []


def test_no_arguments_are_a_question_for_help() -> None:
    assert "train-vae" in runner.invoke(app, "").output
    assert "precision-recall" in runner.invoke(app, "eval").output


def test_help_loads_neither_torch_nor_its_company() -> None:
    heavy = ("torch", "numpy", "datasets", "huggingface_hub", "safetensors", "PIL")
    code = f"""
import sys
from typer.testing import CliRunner
from latentlm_cli.app import app
for command in {("", *COMMANDS)!r}:
    assert CliRunner().invoke(app, command.split() + ["--help"]).exit_code == 0, command
print([name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_version_is_the_package_s() -> None:
    from latentlm_core import __version__

    assert runner.invoke(app, "--version").stdout == f"latentlm {__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "latentlm_cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"latentlm {__version__}\n"


def test_choices_are_those_of_the_core() -> None:
    from latentlm_core import workflows

    for ours, *cores in [
        (sample.sample, workflows.sample, workflows.speak),
        (tokenize.tokenize, workflows.tokenize),
        (bench.sample, workflows.bench_sample),
    ]:
        offered = get_type_hints(ours)
        taken = {name: hint for core in cores for name, hint in get_type_hints(core).items()}
        choices = {name for name in offered if "Literal" in str(offered[name])} - {"split"}
        assert choices
        assert {n: offered[n] for n in choices} == {n: taken[n] for n in choices}
    assert tuple(evaluate.METRICS) == get_args(get_args(_metrics_of(workflows.evaluate_samples))[0])


def _metrics_of(workflow: Callable[..., Result]) -> Any:
    return get_type_hints(workflow)["metrics"]


# --- wrong usage and wrong input -------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("smaple", "sample"),
        ("sample --clas 3", "--class"),
        ("sample -n 0", "--num-samples"),
        ("sample --solver euler", "dpmsolver++"),
        ("sample --text hi --npz", "--npz is for classes"),
        ("sample --text hi --class 3", "--class is for classes"),
        ("sample --protocol 3s-prefix --data x --cfg-schedule linear", "--cfg-schedule is for"),
        ("sample --voice a.wav", "--voice is for speech"),
        ("sample --class 3 --stream", "--stream is for speech"),
        ("sample --class 3 --split train", "--split is a part of --data"),
        ("sample --protocol 3s-prefix --data x --seconds 4", "'4' is not MIN:MAX"),
        ("sample --protocol 3s-prefix --data x --seconds 10:4", "'10:4' is not MIN:MAX"),
        ("sample --protocol 3s-prefix --data x --seconds a:b", "'a:b' is not MIN:MAX"),
        ("sample --protocol 3s-prefix --data x --seconds 4:inf", "'4:inf' is not MIN:MAX"),
        ("sample --protocol whole --data x", "3s-prefix"),
        ("train-vae", "--data"),
        ("eval fdi", "fid"),
        ("eval sweep --cfg 1,two", "not a list like 1,2,3"),
        ("demo --modality smell", "image"),
    ],
)
def test_wrong_usage_is_explained_and_exits_with_2(line: str, complaint: str) -> None:
    done = runner.invoke(app, line)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("train-vae --data minst", "mnist"),
        ("train-vae --data embedded:shapes --recipe tyni", "tiny"),
        ("train-vae --data embedded:shapes --recipe tiny --set loss.bta=1", "beta"),
        ("train-vae --data embedded:shapes --recipe tiny --device tpu", "--device tpu"),
        ("train-lm --data latents/none", "latents/none"),
        ("train-lm", "latentlm tokenize"),
        ("tokenize --data embedded:shapes", "latentlm train-vae"),
        ("sample", "latentlm train-lm"),
        ("sample --model runs/none", "runs/none"),
        ("sample --text hi", "latentlm train-lm"),
        ("sample --text hi --data x", "--protocol"),
        ("sample --text hi --voice-text x", "--voice"),
        ("sample --protocol 3s-prefix", "--data"),
        ("eval fid --reference embedded:shapes", "latentlm sample"),
        ("eval recon --data embedded:shapes", "latentlm train-vae"),
        ("eval sweep --steps 0", "num_inference_steps = 0"),
        ("eval sweep --cfg -3", "guidance_scale = -3"),
        ("push nobody/nothing", "latentlm train-lm"),
    ],
)
def test_wrong_input_is_a_sentence_and_exits_with_1(line: str, complaint: str) -> None:
    done = runner.invoke(app, line)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert re.search(r"^Error: .*[.?]$", done.stderr, re.MULTILINE)
    assert complaint in done.stderr


def test_recipes_are_listed_on_stdout() -> None:
    from latentlm_core.recipes import lm_recipe_names, vae_recipe_names

    done = runner.invoke(app, "train-vae --list-recipes")
    assert tuple(done.stdout.split()) == vae_recipe_names()
    done = runner.invoke(app, "train-lm --list-recipes")
    names = tuple(name for name in done.stdout.splitlines() if not name.endswith(" (--distill)"))
    assert names == lm_recipe_names()
    assert "few-step (--distill)" in done.stdout


# --- the whole path --------------------------------------------------------------------------


def test_the_commands_of_the_readme_follow_one_another(tmp_path: Path) -> None:
    """Each finds what the one before it left, and says on stderr what it took."""
    short = "--recipe tiny --set trainer.total_steps=4 --json"
    trained = answer(f"train-vae --data embedded:shapes {short}")
    assert Path(trained["files"]["export"], "model.safetensors").is_file()
    cached = answer("tokenize --data embedded:shapes --json", "vae-embedded-shapes")
    assert cached["figures"]["examples"] == 256
    plan = answer(f"train-lm {short} --dry-run", "latents/embedded-shapes")
    assert not Path(plan["files"]["run"]).exists()
    answer(f"train-lm {short}", "latents/embedded-shapes")
    line = "sample --class 1 --class circle -n 3 --seed 3 --cfg 2 --steps 2 --out d3 --npz --json"
    drawn = answer(line, "lm-embedded-shapes")
    assert drawn["figures"]["samples"] == 6
    names = {"000000.png", "000005.png", "grid.png", "samples.jsonl", "samples.npz"}
    assert names <= {path.name for path in Path("d3").iterdir()}
    rebuilt = answer("eval recon --data embedded:shapes --extractor none -n 8 --offline --json")
    assert rebuilt["figures"]["psnr"] > 0


def answer(line: str, told: str = "") -> dict[str, Any]:
    """The JSON that a command that succeeds prints, having ``told`` this on stderr."""
    done = runner.invoke(app, line, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert told in done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# --- what an exception becomes ---------------------------------------------------------------


def raising(error: BaseException, name: str = "work") -> typer.Typer:
    """The real application's group around one command that raises."""
    small = typer.Typer(cls=Application, pretty_exceptions_enable=False)

    @small.command(name)
    def work() -> None:
        raise error

    @small.command()
    def rest() -> None:
        pass

    return small


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (ConfigError("No [red]x[/red]."), 1, "Error: No [red]x[/red].\n"),
        (ConfigError("No.", hint="Try y."), 1, "Error: No.\nHint: Try y.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.txt"),
            1,
            "Error: a.txt: No space left on device.\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "Error: Permission denied.\n"),
        (KeyboardInterrupt(), 130, "Interrupted. The same command starts over.\n"),
        (SystemExit(143), 143, "Terminated. The same command starts over.\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_what_is_no_bug_becomes_a_line_and_an_exit_code(
    error: BaseException, code: int, stderr: str
) -> None:
    done = runner.invoke(raising(error), "work")
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", stderr)


@pytest.mark.parametrize("command", ["demo", "train-vae", "tokenize", "train-lm", "sample"])
def test_commands_that_go_on_where_they_were_stopped_say_so(command: str) -> None:
    assert command in COMMANDS
    done = runner.invoke(raising(KeyboardInterrupt(), command), command)
    assert done.stderr == "Interrupted. The same command resumes.\n"
    assert "starts over" in runner.invoke(raising(KeyboardInterrupt(), "push"), "push").stderr


def test_the_extractor_that_is_none_is_offered_where_it_is_taken() -> None:
    assert "or none for no" in runner.invoke(app, "eval recon --help").stdout
    assert "or none for no" not in runner.invoke(app, "eval fid --help").stdout


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), FileNotFoundError(2, "x")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    done = runner.invoke(raising(error), "work")
    assert done.exception is error
    assert done.stderr == ""


def test_debug_shows_the_traceback_before_the_sentence() -> None:
    done = runner.invoke(raising(ConfigError("No.")), "work", env={"LATENTLM_DEBUG": "1"})
    assert done.exit_code == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("Error: No.\n")


def test_long_sentences_are_not_wrapped() -> None:
    long = "word " * 60 + "end."
    assert runner.invoke(raising(ConfigError(long)), "work").stderr == f"Error: {long}\n"


def test_other_ranks_are_silent_but_for_errors() -> None:
    rank = {"RANK": "1"}
    done = runner.invoke(raising(ConfigError("No.")), "work", env=rank)
    assert done.stderr == "Error (rank 1): No.\n"
    assert runner.invoke(raising(KeyboardInterrupt()), "work", env=rank).stderr == ""


# --- processes -------------------------------------------------------------------------------

WAITING = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
from latentlm_cli.app import app, main
@app.command()
def wait() -> None:
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
main()
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "Interrupted. The same command starts over.\n"),
        (signal.SIGTERM, 143, "Terminated. The same command starts over.\n"),
    ],
)
def test_signals_leave_in_order(number: int, code: int, line: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "cleaned up\n", line)


TALKING = """
from latentlm_cli import console
from latentlm_cli.app import app, main
from latentlm_core.result import Result
@app.command()
def talk() -> None:
    for _ in range(99):
        console.show(Result("x" * 9999, {}))
main()
"""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TALKING, "talk"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
