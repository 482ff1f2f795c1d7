import math

import pytest
import torch
from torch import nn

from latentlm_core.config import build
from latentlm_core.errors import ArtifactError, ConfigError
from latentlm_core.training.optim import (
    Ema,
    OptimizerConfig,
    build_optimizer,
    ema_decay,
    load_optimizer,
    optimizer_tensors,
)


class Network(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 5, 4))
        self.label = nn.Embedding(3, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_warm_up_is_linear_and_ends_at_lr():
    config = OptimizerConfig(lr=0.4, warmup_steps=4)
    rates = [config.learning_rate(step, 100) for step in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_cosine_in_closed_form():
    config = OptimizerConfig(lr=2.0, warmup_steps=10, final_lr_ratio=0.1)
    assert config.learning_rate(10, 110) == pytest.approx(2.0)
    assert config.learning_rate(60, 110) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.25)) / 2)
    assert config.learning_rate(35, 110) == pytest.approx(expected)
    assert config.learning_rate(109, 110) == pytest.approx(0.2, abs=1e-3)


def test_constant_stays_and_a_warm_up_longer_than_the_run_is_allowed():
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="constant")
    assert config.learning_rate(999, 1000) == 1.0
    assert OptimizerConfig(lr=1.0, warmup_steps=10).learning_rate(4, 5) == pytest.approx(0.5)


def test_only_matrices_of_layers_decay():
    network = Network()
    optimizer = build_optimizer(network, OptimizerConfig(weight_decay=0.5))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {name for name in decay if decay[name] == 0.5} == {"conv.weight", "linear.weight"}
    assert {name for name in decay if decay[name] == 0.0} == {
        "position", "label.weight", "conv.bias", "norm.weight", "norm.bias", "linear.bias",
    }  # fmt: skip


def test_two_updates_equal_adamw_written_out():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    config = OptimizerConfig(lr=0.1, weight_decay=0.01)
    optimizer = build_optimizer(layer, config)
    optimizer.found_inf = torch.zeros(())
    weight, mean, square = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -1.5), start=1):
        layer.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.98 * square + 0.02 * gradient**2
        update = (mean / (1 - 0.9**step)) / (math.sqrt(square / (1 - 0.98**step)) + 1e-8)
        weight = weight * (1 - 0.1 * 0.01) - 0.1 * update
        assert layer.weight.item() == pytest.approx(weight, rel=1e-6)


def test_found_inf_keeps_weights_and_state():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    optimizer = build_optimizer(layer, OptimizerConfig())
    for failed in (0.0, 1.0, 0.0):
        before = [value.clone() for value in layer.state_dict().values()]
        state = {
            name: value.clone()
            for name, value in optimizer_tensors(optimizer, dict(layer.named_parameters())).items()
        }
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, math.nan if failed else 1.0)
        optimizer.found_inf = torch.tensor(failed)
        optimizer.step()
        after = optimizer_tensors(optimizer, dict(layer.named_parameters()))
        changed = not all(map(torch.equal, before, layer.state_dict().values()))
        assert changed == (not failed)
        if failed:
            assert all(torch.equal(state[name], after[name]) for name in state)
    assert after["weight.step"].item() == 2


def test_optimizer_state_is_kept_by_name():
    def trained(seed: int) -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(seed)
        layer = nn.Linear(3, 2)
        optimizer = build_optimizer(layer, OptimizerConfig())
        optimizer.found_inf = torch.zeros(())
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        return layer, optimizer

    layer, optimizer = trained(0)
    other, fresh = trained(1)
    saved = optimizer_tensors(optimizer, dict(layer.named_parameters()))
    assert set(saved) == {
        f"{name}.{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    load_optimizer(fresh, dict(other.named_parameters()), saved, "file")
    loaded = optimizer_tensors(fresh, dict(other.named_parameters()))
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    with pytest.raises(ArtifactError, match=r"file does not fit: alien\.exp_avg is unknown"):
        load_optimizer(
            fresh, dict(other.named_parameters()), saved | {"alien.exp_avg": torch.zeros(1)}, "file"
        )


def test_ema_warm_up_in_closed_form():
    assert [ema_decay(step, 0.9999) for step in (0, 1, 8)] == pytest.approx([0.1, 2 / 11, 0.5])
    assert ema_decay(10**7, 0.9999) == 0.9999
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 0.0)
    ema = Ema(layer, 0.9999)
    expected = 0.0
    for step in range(50):
        with torch.no_grad():
            layer.weight.fill_(step + 1.0)
        ema.update(step)
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * (step + 1.0)
    assert ema.tensors()["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert expected > 40, "the average follows the weights from the start"


def test_ema_is_float32_and_copies_buffers():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    ema = Ema(network, 0.5)
    network[1].running_mean.fill_(7.0)
    network[1].num_batches_tracked.fill_(3)
    ema.update(0)
    tensors = ema.tensors()
    assert tensors.keys() == network.state_dict().keys()
    assert tensors["0.weight"].dtype == torch.float32
    assert tensors["1.running_mean"].tolist() == [7.0, 7.0]
    assert tensors["1.num_batches_tracked"].item() == 3


def test_ema_applied_gives_the_own_weights_back_exactly():
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    ema = Ema(layer, 0.9)
    with torch.no_grad():
        layer.weight.add_(1.0)
    own, average = layer.weight.clone(), ema.tensors()["weight"].clone()
    with ema.applied():
        assert torch.equal(layer.weight, average)
    assert torch.equal(layer.weight, own)
    assert not torch.equal(own, average)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, 1e3)])
def test_betas_are_shares_below_one(betas):
    with pytest.raises(ConfigError, match=r"optimizer: betas\.[01] = "):
        build(OptimizerConfig, {"betas": betas}, "optimizer")
    assert build(OptimizerConfig, {"betas": [0, 0.999]}, "optimizer").betas == (0.0, 0.999)
