"""Training on real processes (gloo): the same run however many there are and however it is held."""

from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from latentlm_core.errors import ConfigError
from latentlm_core.processes import Processes, current
from latentlm_core.training import parallel
from latentlm_core.training.parallel import StepShare, mesh_of
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.validation import validate
from tests.crew import crew
from tests.tiny_parallel import Trained, make_trainer, train

TIMING = {"samples_per_second", "tokens_per_second", "flops_utilisation", "data_wait_share"}
OF_ONE_BATCH = {"std_mean", "std_latent", "noise_to_signal", "gan_pull"}
"""Figures that are no sums over elements: those of a share differ from those of a batch."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""

    @cache
    def run(kind: str, accumulate: int) -> Trained:
        return train(tmp_path_factory.mktemp("alone"), kind, {"accumulate": accumulate})

    return run


def assert_same(many: Trained, one: Trained) -> None:
    assert many.tensors.keys() == one.tensors.keys(), "names do not change"
    for name, tensor in one.tensors.items():
        least = 1e-9 if name.startswith("optimizer.") else 1e-7  # some gradients are rounding alone
        rounding = max(1e-5 * float(tensor.abs().max()), least)
        torch.testing.assert_close(many.tensors[name], tensor, rtol=0, atol=rounding, msg=name)
    assert many.samples_seen == one.samples_seen
    assert many.figures.keys() == one.figures.keys()
    for name in one.figures.keys() - TIMING - OF_ONE_BATCH:
        assert many.figures[name] == pytest.approx(one.figures[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("kind", "size", "accumulate"),
    [
        ("lm", 2, 4),
        ("lm", 4, 4),
        ("lm", 4, 1),
        ("lm", 4, 2),
        ("distill", 2, 4),
        ("distill", 4, 2),
        ("vae", 2, 4),
        ("vae", 4, 2),
        ("vit", 2, 1),
        ("speech", 2, 2),
        ("dit", 4, 1),
    ],
)
def test_several_processes_train_what_one_does(tmp_path, alone, how, kind, size, accumulate):
    one = alone(kind, accumulate)
    norms = [value for name, value in one.figures.items() if name.startswith("grad_norm/")]
    assert min(norms) > 0.01, "clipping is in force"
    for many in crew().run(size, train, tmp_path, kind, _config(how, accumulate)):
        assert_same(many, one)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["samples_seen"] == one.samples_seen


def test_two_copies_of_two_shares_train_the_same(tmp_path, alone):
    config = _config("fsdp", 4) | {"shard_size": 2}
    for many in crew().run(4, train, tmp_path, "lm", config):
        assert_same(many, alone("lm", 4))


@pytest.mark.parametrize(("size", "shard_size"), [(2, 0), (4, 2)])
def test_gradients_that_are_reduced_after_each_batch_come_to_the_same(
    tmp_path, alone, size, shard_size
):
    config = _config("fsdp", 8) | {"shard_size": shard_size, "reduce_each_batch": True}
    for many in crew().run(size, train, tmp_path, "lm", config):
        assert_same(many, alone("lm", 8))


@pytest.mark.parametrize("kind", ["lm", "vae"])
def test_blocks_computed_again_come_to_the_same(tmp_path, alone, kind):
    assert_same(train(tmp_path / "one", kind, {"accumulate": 2, "recompute": True}), alone(kind, 2))
    config = _config("fsdp", 2) | {"recompute": True}
    for many in crew().run(2, train, tmp_path / "two", kind, config):
        assert_same(many, alone(kind, 2))


def test_what_is_computed_again_is_not_kept(tmp_path):
    def kept(recompute: bool) -> int:
        trainer = make_trainer(tmp_path, "lm", recompute=recompute)
        (batch,), sizes = trainer._feed.again(0), []
        (turn,) = trainer.task.turns(0)
        note = lambda tensor: sizes.append(tensor.nbytes) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            turn.loss(batch, torch.Generator())
        return sum(sizes)

    assert kept(True) < 0.7 * kept(False)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_accumulated_gradients_are_exchanged_once(tmp_path, how):
    few, many = (
        crew().run(2, _exchanges, tmp_path / f"{accumulate}", _config(how, accumulate))
        for accumulate in (2, 8)
    )
    assert few == many
    assert few[0] > 0
    if how == "fsdp":
        config = _config(how, 8) | {"reduce_each_batch": True}
        assert crew().run(2, _exchanges, tmp_path / "each", config) == [4 * few[0]] * 2


def _exchanges(folder: Path, config: dict[str, Any]) -> int:
    """Gradient buckets that a run of one step exchanges."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    calls, summed, reduced = [], parallel._sum, group.foreach_reduce
    try:
        parallel._sum = _counting(summed, calls)
        group.foreach_reduce = _counting(reduced, calls)
        make_trainer(folder, "lm", total_steps=1, **config).run()
    finally:
        parallel._sum, group.foreach_reduce = summed, reduced
    return len(calls)


def _counting(function: Any, calls: list[None]) -> Any:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize(("size", "how"), [(2, "ddp"), (4, "fsdp")])
def test_validation_is_that_of_one_process_to_the_bit(tmp_path, size, how):
    one = _validated(tmp_path, {})
    assert one["latent"] > 0
    assert crew().run(size, _validated, tmp_path, _config(how, 4)) == [one] * size


def _validated(folder: Path, config: dict[str, Any]) -> dict[str, float | None]:
    """Figures of three batches, which the processes do not share evenly."""
    trainer = make_trainer(folder, "lm", **config)
    stepper, cpu = trainer._state.stepper, torch.device("cpu")
    return validate(trainer.task, trainer._feed.held_out(), stepper, 0, cpu, current(), None)


@pytest.mark.parametrize(("accumulate", "size"), [(1, 1), (6, 3), (4, 4), (2, 6), (1, 3)])
def test_the_batches_and_rows_of_a_step_are_all_taken_once(accumulate, size):
    taken = []
    for rank in range(size):
        share = StepShare.of(accumulate, Processes(rank, size))
        index, count = share.rows
        numbers = share.numbers(5)
        for _ in share.indices:
            taken.append((next(numbers), index, count))
        assert next(numbers) == 6 * accumulate + share.indices[0]
    batches = range(5 * accumulate, 6 * accumulate)
    sharers = max(size // accumulate, 1)
    assert sorted(taken) == [(b, index, sharers) for b in batches for index in range(sharers)]


def test_numbers_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match=r"6 processes cannot share .* = 4 batches") as caught:
        StepShare.of(4, Processes(0, 6))
    assert "to 1, 2, 3 or a multiple of 6" in caught.value.hint
    with pytest.raises(ConfigError, match="shard_size = 3 does not divide the 4 processes"):
        mesh_of("fsdp", 3, torch.device("cpu"), Processes(0, 4))
    assert mesh_of("fsdp", 3, torch.device("cpu"), Processes()) is None


def _config(how: str, accumulate: int) -> dict[str, Any]:
    return {"parallel": how, "accumulate": accumulate}
