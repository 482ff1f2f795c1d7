"""What a run does about steps that are not finite: stop, skip, roll back, and start again."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from latentlm_core.draws import WHOLE, Share
from latentlm_core.errors import CorruptFileError, TrainingError
from latentlm_core.training.optim import Ema, OptimizerConfig
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.step import Stepper
from latentlm_core.training.tasks import Term, Terms
from latentlm_core.training.trainer import TrainResult
from tests.tiny_training import (
    Adversarial,
    Listener,
    Points,
    Regression,
    Stream,
    make,
    noisy,
    traces,
)


def reports(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bad-numbers.json").read_text("utf-8"))


def everything(folder: Path) -> tuple[Any, ...]:
    """What a run leaves, its memory of bad steps included."""
    return (*traces(folder), reports(folder))


def without_counter(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "skipped_steps"} for row in rows]


def run_until_done(folder: Path, stream: Stream, make_task: Any, **config: Any) -> TrainResult:
    """Start the run again and again, until nothing interrupts it."""
    for _ in range(20):
        try:
            return make(folder, make_task(), stream, **config).run()
        except (KeyboardInterrupt, RuntimeError):
            continue
    raise AssertionError("the run never ended")


def test_a_run_stops_with_a_report_and_goes_on_with_another_policy(tmp_path):
    stream = Stream(spoil={7: math.nan})
    with pytest.raises(TrainingError) as caught:
        make(tmp_path, noisy(), stream).run()
    message = str(caught.value)
    assert message.startswith("Step 8 is not finite and was not applied (")
    assert message.endswith(": x of its data is not finite, in " + ", ".join(
        f"b7-{row}" for row in range(8)) + ".")  # fmt: skip
    assert "skip (or rollback)" in caught.value.hint
    assert str(tmp_path / "bad-numbers.json") in caught.value.hint
    (report,) = reports(tmp_path)["reports"]
    keys = [f"b7-{row}" for row in range(8)]
    figures = report.pop("figures")
    assert report == {
        "step": 8,
        "action": "stopped",
        "turn": "main",
        "cause": "data",
        "name": "x",
        "timesteps": [],
        "keys": keys,
        "examples": keys,
        "num_examples": 8,
        "place": 7,
        "noticed": 8,
    }
    assert figures["loss/main"] == "nan"

    listener = Listener()
    make(tmp_path, noisy(), stream, progress=listener, on_bad_numbers="skip").run()
    assert reports(tmp_path)["skipped"] == [8]
    assert [report["action"] for report in reports(tmp_path)["reports"]] == ["skipped"]
    (warning,) = [text for text in listener.warnings if text.startswith("Step 8")]
    assert warning.endswith("; it is skipped.")


def test_a_skipped_step_changes_nothing(tmp_path):
    task, config = noisy(), OptimizerConfig(lr=0.02, warmup_steps=2)
    (turn,) = task.turns(0)
    stepper = Stepper(
        {"main": task.net}, {"main": config}, total_steps=13, seed=0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    ema = Ema(task.net, 0.9999)
    losses = {}
    for step, batch in zip(range(13), Stream().batches(range(13)), strict=True):
        if step != 6:
            losses[step] = stepper.step([turn], [batch], step)["loss/main"].total.item()
        ema.update(step)

    trainer = make(tmp_path, noisy(), Stream(spoil={6: math.inf}), on_bad_numbers="skip")
    trainer.run()
    state = trainer._state
    pairs = [(stepper.tensors(), state.stepper.tensors()), (ema.tensors(), state.ema.tensors())]
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert state.stepper.tensors()["main.weight.step"] == 12
    rows = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert rows[8]["loss/main"] == pytest.approx((losses[4] + losses[5] + losses[7]) / 3)
    assert {step: row["skipped_steps"] for step, row in rows.items()} == {4: 0, 8: 1, 12: 1, 13: 1}


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("make_task", [noisy, Adversarial])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_a_run_with_bad_steps_that_is_interrupted_equals_the_undisturbed_one(
    tmp_path, policy, make_task, fault
):
    config = {"on_bad_numbers": policy, "accumulate": 2, "validate_every": 6}
    spoil = {5: math.nan, 13: math.inf, 14: math.nan}
    run_until_done(tmp_path / "whole", Stream(spoil=spoil), make_task, **config)
    faults = {index: fault("stop") for index in (0, 4, 6, 11, 12, 15, 16, 20)}
    stream = Stream(spoil=spoil, faults=faults)
    run_until_done(tmp_path / "stopped", stream, make_task, **config)
    assert not faults
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")
    _, rows = traces(tmp_path / "whole")
    assert rows[-1]["skipped_steps"] == (3 if policy == "skip" else 8)
    losses = [value for row in rows for name, value in row.items() if name.startswith("loss/")]
    assert all(map(math.isfinite, losses))


@dataclass
class Jumping(Stream):
    """The batches of a stream without some of them."""

    missing: tuple[int, ...] = ()

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[Points]:
        left = (number for number in range(99) if number not in self.missing)
        wanted = dict(enumerate(left))
        return super().batches((wanted[number] for number in numbers if number in wanted), share)


def test_a_roll_back_leaves_out_the_batches_from_the_checkpoint_to_the_bad_step(tmp_path):
    stream, listener = Stream(spoil={2: math.nan, 8: math.nan, 9: math.inf}), Listener()
    result = make(
        tmp_path / "run", noisy(), stream, progress=listener, on_bad_numbers="rollback"
    ).run()
    clean = Jumping(missing=(0, 1, 2, 8, 9))
    make(tmp_path / "clean", noisy(), clean, on_bad_numbers="rollback").run()
    hashes, rows = traces(tmp_path / "run")
    assert hashes == traces(tmp_path / "clean")[0]
    assert without_counter(rows) == without_counter(traces(tmp_path / "clean")[1])
    assert rows[-1]["skipped_steps"] == 5
    assert result.samples_seen == 13 * 8
    assert reports(tmp_path / "run")["roll_backs"] == [
        {"step": 3, "to": 0},
        {"step": 6, "to": 5},
        {"step": 6, "to": 5},
    ]
    assert [report["place"] for report in reports(tmp_path / "run")["reports"]] == [2, 8, 9]
    told = [text for text in listener.warnings if "back to step" in text]
    assert told[0].endswith("; back to step 0, without the batches up to here.")
    assert listener.step == 13


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("skip", "; the 2 steps before it were skipped already."),
        ("rollback", "; the run went back to step 5 2 times already."),
    ],
)
def test_too_many_bad_steps_stop_a_run_wherever_it_is_started_again(tmp_path, policy, reason):
    bad = range(5, 9)
    config = {"on_bad_numbers": policy, "max_bad_steps": 2}
    with pytest.raises(TrainingError) as caught:
        make(tmp_path, noisy(), Stream(spoil=dict.fromkeys(bad, math.nan)), **config).run()
    assert str(caught.value).endswith(reason)
    expected = everything(tmp_path)
    for fault in (KeyboardInterrupt, RuntimeError):
        stream = Stream(spoil=dict.fromkeys(bad, math.nan), faults={6: fault()})
        with pytest.raises(TrainingError):
            run_until_done_unless_stopped(tmp_path, stream, **config)
        assert everything(tmp_path)[1:] == expected[1:]
    apart = Stream(spoil=dict.fromkeys((1, 3, 6, 8, 9, 11), math.nan))
    make(tmp_path / "apart", noisy(), apart, **config, save_every=1).run()


def run_until_done_unless_stopped(folder: Path, stream: Stream, **config: Any) -> None:
    for _ in range(3):
        try:
            make(folder, noisy(), stream, **config).run()
        except (KeyboardInterrupt, RuntimeError):
            continue


@dataclass
class HostStream(Stream):
    """Batches that stay where they are."""

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[Any]:
        for batch in super().batches(numbers, share):
            batch.to = lambda device, batch=batch: batch  # type: ignore[method-assign]
            yield batch


def run_late(folder: Path, spoil: dict[int, float], progress: Any = None, **config: Any) -> None:
    """Run as on a GPU, whose host looks at the figures when a row or a checkpoint is due."""
    trainer = make(
        folder, noisy(), HostStream(spoil=spoil, held_out_batches=0), progress=progress,
        log_every=13, **config,
    )  # fmt: skip
    trainer.device = torch.device("meta")
    reads = trainer._read

    def read() -> None:
        read_at.append(trainer._state.step)
        reads()

    read_at: list[int] = []
    trainer._read = read
    trainer.run()
    assert set(read_at) <= {5, 8, 10, 13}, "not at each step"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_host_that_looks_late_comes_to_the_same_run(tmp_path, policy):
    spoil = {3: math.nan, 6: math.inf, 7: math.nan, 11: math.nan}
    config = {"on_bad_numbers": policy}
    stream = Stream(spoil=spoil, held_out_batches=0)
    make(tmp_path / "prompt", noisy(), stream, log_every=13, **config).run()
    run_late(tmp_path / "late", spoil, **config)
    assert traces(tmp_path / "late") == traces(tmp_path / "prompt")

    def interrupt(now: int) -> None:
        if now == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_late(tmp_path / "stopped", spoil, Listener(on_advance=interrupt), **config)
    run_late(tmp_path / "stopped", spoil, **config)
    assert traces(tmp_path / "stopped") == traces(tmp_path / "prompt")


def test_a_host_that_looks_late_stops_with_the_weights_of_before(tmp_path):
    with pytest.raises(TrainingError, match="Step 8 is not finite"):
        run_late(tmp_path, {7: math.nan, 8: math.nan})
    (report,) = reports(tmp_path)["reports"]
    assert (report["step"], report["noticed"], report["cause"]) == (8, 10, "data")


def test_a_bad_turn_takes_back_the_statistics_and_keeps_the_turn_before(tmp_path):
    task = Adversarial()
    modules = {"generator": task.net, "critic": task.critic}
    stepper = Stepper(
        modules, dict.fromkeys(modules, OptimizerConfig()), total_steps=9, seed=0,
        device=torch.device("cpu"), dtype=torch.float32, skips=True,
    )  # fmt: skip
    batches = Stream(spoil={1: math.nan}).batches(range(9))

    def values() -> list[list[torch.Tensor]]:
        parts = (task.net.parameters(), task.critic.parameters(), task.net.buffers())
        return [[tensor.detach().clone() for tensor in part] for part in parts]

    def moved(before: list[list[torch.Tensor]]) -> list[bool]:
        return [
            not all(map(torch.equal, one, other))
            for one, other in zip(before, values(), strict=True)
        ]

    before = values()
    stepper.step(task.turns(3), [next(batches)], 3)
    assert moved(before) == [True, True, True]
    before = values()
    stepper.step(task.turns(4), [next(batches)], 4)
    assert moved(before) == [False, False, False]
    judge = task._judge

    def spoilt(*args: Any) -> Terms:
        return {name: Term(term.total * math.nan, 1) for name, term in judge(*args).items()}

    task._judge = spoilt
    stepper.step(task.turns(5), [next(batches)], 5)
    assert moved(before)[:2] == [True, False]
    before, task._judge = values(), judge
    stepper.step(task.turns(6), [next(batches)], 6)
    assert moved(before) == [True, True, True]


class Fragile(Regression):
    """Whose memory fails at the seventh loss; it logs a term that is never finite."""

    def __init__(self) -> None:
        super().__init__(noise=0.3)
        self.breaks_at = 7

    def _loss(self, batch: Points, rng: torch.Generator) -> Terms:
        terms = super()._loss(batch, rng)
        if len([event for event in self.events if event == "loss"]) == self.breaks_at:
            with torch.no_grad():
                self.net.weight[0, 1] = math.nan
        return terms | {"logged": Term(torch.tensor(math.nan), 1)}


def test_damaged_weights_are_no_matter_of_skipping_but_of_going_back(tmp_path):
    with pytest.raises(TrainingError) as caught:
        make(tmp_path / "skip", Fragile(), on_bad_numbers="skip").run()
    assert "the weights net.weight were not finite before it" in str(caught.value)
    assert str(caught.value).endswith("; skipping steps does not mend that.")
    assert "Run it again" in caught.value.hint
    make(tmp_path / "back", Fragile(), on_bad_numbers="rollback").run()
    assert reports(tmp_path / "back")["roll_backs"] == [{"step": 8, "to": 5}]


def test_a_figure_that_is_only_logged_stops_nothing(tmp_path):
    task = Fragile()
    task.breaks_at = 99
    make(tmp_path, task).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["logged"] for row in rows] == [None] * 4
    assert not any("skipped_steps" in row for row in rows)
    assert not (tmp_path / "bad-numbers.json").exists()


def test_a_damaged_memory_is_refused_and_one_of_another_time_forgotten(tmp_path):
    stream = Stream(spoil={6: math.nan})
    make(tmp_path, noisy(), stream, on_bad_numbers="rollback").run()
    make(tmp_path / "copy", noisy(), stream, on_bad_numbers="rollback").run()
    path = tmp_path / "bad-numbers.json"
    text = path.read_text("utf-8")
    for damaged in (text[:-9], text.replace('"to": 5', '"to": "5"'), "[]"):
        path.write_text(damaged, "utf-8")
        with pytest.raises(CorruptFileError, match=r"bad-numbers\.json"):
            make(tmp_path, noisy(), stream, on_bad_numbers="rollback").run()
    path.write_text(text, "utf-8")
    for folder in (tmp_path / "checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    make(tmp_path, noisy(), Stream(), on_bad_numbers="rollback").run()
    assert reports(tmp_path)["roll_backs"] == []
    assert traces(tmp_path)[0] != traces(tmp_path / "copy")[0]
