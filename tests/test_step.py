import math
from itertools import count

import pytest
import torch
from torch import nn

from latentlm_core.files import read_safetensors
from latentlm_core.training.hardware import compile_blocks
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.step import Stepper
from latentlm_core.training.tasks import Term, Terms, Turn
from tests.tiny_training import (
    Adversarial,
    Points,
    Regression,
    Stream,
    make,
)


def make_stepper(
    modules: dict[str, nn.Module], config: OptimizerConfig | None = None, seed: int = 0
) -> Stepper:
    return Stepper(
        modules,
        dict.fromkeys(modules, config or OptimizerConfig()),
        total_steps=9,
        seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("knows_counts", [False, True])
def test_splitting_a_batch_with_unequal_counts_changes_only_the_rounding(tmp_path, knows_counts):
    whole, split = Regression(), Regression(knows_counts=knows_counts)
    rights = [task_count(Stream(parts=2), index) for index in range(2)]
    assert rights[0] != rights[1], "equal counts would prove nothing"
    make(tmp_path / "whole", whole, total_steps=6).run()
    make(tmp_path / "split", split, Stream(parts=2), total_steps=6, accumulate=2).run()
    for name in ("step-00000005", "step-00000006"):
        models = [
            read_safetensors(tmp_path / run / "checkpoints" / name / "model.safetensors")
            for run in ("whole", "split")
        ]
        for key in models[0]:
            torch.testing.assert_close(models[0][key], models[1][key], rtol=1e-5, atol=1e-6)
    rows = [read_metrics(tmp_path / run / "metrics.jsonl")[0] for run in ("whole", "split")]
    for key in ("squared", "right", "loss/main", "grad_norm/main"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-5)
    order = ["loss", "backward"] * 2 if knows_counts else ["loss", "loss", "backward", "backward"]
    assert split.events[:4] == order, "known counts free each graph before the next"


def task_count(stream: Stream, index: int) -> int:
    return Regression()._counts(next(stream.batches([index])))["right"]


def test_after_a_bad_step_nothing_moves_even_if_nobody_looks():
    """A GPU's host looks at the figures late: the steps until then must not do harm."""
    task = Adversarial()
    stepper = make_stepper({"generator": task.net, "critic": task.critic})
    stream = Stream(spoil={4: math.nan}).batches(count(3))
    weights = []
    for step in (3, 4, 5):
        stepper.step(task.turns(step), [next(stream)], step)
        parameters = [*task.net.parameters(), *task.critic.parameters()]
        weights.append([parameter.detach().clone() for parameter in parameters])
    assert all(map(torch.equal, weights[0], weights[1]))
    assert all(map(torch.equal, weights[0], weights[2]))


def test_each_turn_updates_its_own_module_only():
    task = Adversarial()
    critic = [parameter.detach().clone() for parameter in task.critic.parameters()]
    stepper = make_stepper(
        {"generator": task.net, "critic": task.critic}, OptimizerConfig(weight_decay=0.5)
    )
    batches = [next(Stream().batches([0]))]
    figures = stepper.step(task.turns(0), batches, 0)
    assert all(map(torch.equal, critic, task.critic.parameters()))
    assert figures.keys() == {"copy", "gan", "loss/generator", "grad_norm/generator"}
    figures = stepper.step(task.turns(3), batches, 3)
    assert not any(map(torch.equal, critic, task.critic.parameters()))
    assert "loss/critic" in figures


def test_every_step_part_and_turn_draws_its_own_noise():
    draws = []

    def loss(batch: Points, rng: torch.Generator) -> Terms:
        draws.append(torch.randn((), generator=rng).item())
        return {"output": Term(net(batch.x).sum(), 1)}

    net = nn.Linear(2, 1)
    turns = [Turn(name, net, loss, {"output": 1.0}) for name in ("first", "second")]
    for seed in (0, 1, 0):
        stepper = make_stepper({turn.name: net for turn in turns}, seed=seed)
        parts = [next(Stream().batches([index])) for index in range(2)]
        for step in range(2):
            stepper.step(turns, parts, step)
    assert len(set(draws[:16])) == 16
    assert draws[16:] == draws[:8]


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    norms = {}
    for clip_norm in (0.0, 0.01):
        task = Regression()
        stepper = make_stepper({"main": task.net}, OptimizerConfig(clip_norm=clip_norm))
        figures = stepper.step(task.turns(0), [next(Stream().batches([0]))], 0)
        gradients = torch.cat([p.grad.flatten() for p in task.net.parameters()])
        norms[clip_norm] = (figures["grad_norm/main"].total.item(), gradients.norm().item())
    assert norms[0.0][0] == norms[0.01][0] > 1.0
    assert norms[0.0][1] == pytest.approx(norms[0.0][0], rel=1e-6)
    assert norms[0.01][1] == pytest.approx(0.01, rel=1e-3)


def test_blocks_are_compiled_once_each_and_keep_their_names(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    inner = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    network = nn.Module()
    network.blocks = nn.ModuleList([inner, nn.Linear(2, 2)])
    network.head = nn.Linear(2, 2)
    network.stem = nn.Sequential(nn.Linear(2, 2))
    names = list(network.state_dict())
    compile_blocks(network)
    assert compiled == [inner, network.blocks[1], network.stem]
    assert list(network.state_dict()) == names


def test_the_schedule_of_a_turn_counts_from_its_first_step():
    task, config = Adversarial(), OptimizerConfig(lr=0.1, warmup_steps=2)
    stepper = make_stepper({"generator": task.net, "critic": task.critic}, config)
    rates = [stepper.learning_rates(task.turns(step), step) for step in range(9)]
    own = [rate["lr/critic"] for rate in rates if "lr/critic" in rate]
    assert own == [config.learning_rate(step, 6) for step in range(6)]
    assert own[:2] == pytest.approx([0.05, 0.1]), "it warms up although the run has long begun"
    assert [rate["lr/generator"] for rate in rates] == [
        config.learning_rate(step, 9) for step in range(9)
    ]

    before = [parameter.detach().clone() for parameter in task.critic.parameters()]
    stepper.step(task.turns(3), [next(Stream().batches([3]))], 3)
    after = [parameter.detach() for parameter in task.critic.parameters()]
    moved = max(float((new - old).abs().max()) for old, new in zip(before, after, strict=True))
    assert moved == pytest.approx(0.05, rel=0.02), "AdamW's first step is as long as its rate"
