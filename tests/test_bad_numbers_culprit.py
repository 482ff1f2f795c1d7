"""What is named as the culprit of a step that is not finite."""

import math

import pytest
import torch
from torch import Tensor, nn

from latentlm_core.training import culprit as culprit_module
from latentlm_core.training.culprit import Culprit, find_culprit
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.step import Stepper
from latentlm_core.training.tasks import Term, Terms, Turn
from tests import tiny_vae_task
from tests.test_lm_task import make_batch, make_task
from tests.tiny_training import Points, Stream


class Poison(torch.autograd.Function):
    """The identity, whose gradient is not finite where ``mask`` is."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient.masked_fill(mask, math.nan), None


class Faulty(nn.Module):
    """Hands on what ``inner`` makes, and breaks some rows of it, forwards or backwards."""

    def __init__(self, inner: nn.Module, fault: str, rows: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.inner = inner
        self.fault = fault
        self.rows = rows

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.inner(*inputs)
        return spoil(
            output, self.fault, torch.isin(torch.arange(len(output)), torch.tensor(self.rows))
        )


def spoil(x: Tensor, fault: str, rows: Tensor) -> Tensor:
    mask = rows.reshape(-1, *(1,) * (x.ndim - rows.ndim)).expand_as(x)
    return x.masked_fill(mask, math.inf) if fault == "forward" else Poison.apply(x, mask)


class Block(nn.Module):
    """Reads a condition that all blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(4, 4)
        self.feed_forward = nn.Linear(4, 4)
        self.between = lambda x: x

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.feed_forward(self.between(self.modulation(condition) * x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(2, 4)
        self.condition = nn.Linear(2, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        condition, x = self.condition(x), self.stem(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


class NetTask:
    name = "net"

    def __init__(self, knows_counts: bool = True) -> None:
        self.net = Net()
        self.modules = {"net": self.net}
        self.change = lambda error: error
        counts = (lambda batch: {"squared": len(batch)}) if knows_counts else None
        self.turn = Turn("main", self.net, self._loss, {"squared": 1.0}, counts)

    def _loss(self, batch: Points, rng: torch.Generator) -> Terms:
        error = self.net(batch.x + torch.randn(batch.x.shape, generator=rng)).squeeze(1) - batch.y
        logged = Term(torch.tensor(math.nan), 1)
        return {"squared": Term(self.change(error).square().sum(), len(batch)), "logged": logged}


def examine(task, turn: Turn, batches, spoiled=None) -> Culprit:
    stepper = Stepper(
        {turn.name: turn.module},
        {turn.name: OptimizerConfig()},
        total_steps=9,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    stepper.step([turn], batches, 0)
    hooks = hooks_of(turn.module)
    state = {name: tensor.clone() for name, tensor in turn.module.state_dict().items()}
    if spoiled is not None:
        spoiled(stepper)
    again = lambda watched: stepper.again(watched, batches, 0)  # noqa: E731
    found = find_culprit(task, turn, batches, stepper.tensors(), again)
    if spoiled is None:
        after = turn.module.state_dict()
        assert all(torch.equal(state[name], after[name]) for name in state)
        assert hooks_of(turn.module) == hooks
        assert not any(parameter._backward_hooks for parameter in turn.module.parameters())
    return found


def hooks_of(module: nn.Module) -> list[list[int]]:
    return [[*part._forward_hooks, *part._forward_pre_hooks] for part in module.modules()]


def points(*numbers: int) -> list[Points]:
    return list(Stream().batches(numbers))


@pytest.mark.parametrize("fault", ["forward", "gradient"])
@pytest.mark.parametrize("knows_counts", [False, True])
def test_the_first_module_is_named_with_the_batch_it_failed_in(fault, knows_counts):
    task = NetTask(knows_counts)
    block, calls = task.net.blocks[2], []

    def second_call(x: Tensor) -> Tensor:
        calls.append(x)
        return x if len(calls) % 2 else spoil(x, fault, torch.arange(8) == 5)

    block.feed_forward = nn.Sequential(nn.Linear(4, 4), block.feed_forward)
    block.feed_forward[1].register_forward_hook(lambda module, args, output: second_call(output))
    found = examine(task, task.turn, points(3, 4))
    assert found == Culprit(fault, "net.blocks.2.feed_forward.1", ("b4-5",))


@pytest.mark.parametrize("fault", ["forward", "gradient"])
def test_a_wrapped_module_and_an_operation_between_modules_are_told_apart(fault):
    task = NetTask()
    task.net.blocks[1].modulation = Faulty(task.net.blocks[1].modulation, fault)
    found = examine(task, task.turn, points(0))
    assert found == Culprit(fault, "net.blocks.1.modulation", ("b0-1",))

    task = NetTask()
    task.net.blocks[1].between = lambda x: spoil(x, fault, torch.arange(8) == 6)
    found = examine(task, task.turn, points(0))
    assert found == Culprit(fault, "net.blocks.1", ("b0-6",))


def test_a_loss_that_spoils_finite_outputs_or_gradients_is_named():
    task = NetTask()
    task.change = lambda error: error * 1e30
    assert examine(task, task.turn, points(0)) == Culprit("loss", "squared")
    task.change = lambda error: spoil(error, "gradient", torch.arange(8) == 2)
    assert examine(task, task.turn, points(0)) == Culprit("gradient", None, ("b0-2",))


def test_a_norm_that_overflows_names_the_largest_gradient():
    task = NetTask()
    task.change = lambda error: error * 1e11
    assert examine(task, task.turn, points(0)) == Culprit("gradient norm", "net.head.weight")


def test_damage_from_before_is_named_before_all_else():
    task, batches = NetTask(), points(0)

    def spoil_weight(stepper: Stepper) -> None:
        with torch.no_grad():
            task.net.blocks[3].feed_forward.bias[1] = math.nan

    def spoil_state(stepper: Stepper) -> None:
        stepper.tensors()["main.head.weight.exp_avg_sq"][0] = math.inf

    assert examine(task, task.turn, batches, spoil_state) == Culprit(
        "optimizer", "main.head.weight.exp_avg_sq"
    )
    assert examine(task, task.turn, batches, spoil_weight) == Culprit(
        "weights", "net.blocks.3.feed_forward.bias"
    )


def test_data_that_are_not_finite_are_named_by_their_keys():
    task, batches = NetTask(), points(0, 1)
    batches[1].x[3, 1] = math.inf
    batches[1].y[5] = math.nan
    assert examine(task, task.turn, batches) == Culprit("data", "x", ("b1-3", "b1-5"))


def test_a_step_that_is_finite_the_second_time_has_no_culprit():
    task = NetTask()
    assert examine(task, task.turn, points(0)) == Culprit("unknown")


class FaultyTimesteps(nn.Module):
    """An embedding of timesteps that fails in a band."""

    def __init__(self, inner: nn.Module, fault: str) -> None:
        super().__init__()
        self.inner = inner
        self.fault = fault
        self.seen: list[Tensor] = []

    def forward(self, t: Tensor) -> Tensor:
        self.seen.append(t)
        output = self.inner(t)
        wrong = ((t >= 250) & (t < 500)).unsqueeze(-1).expand_as(output)
        if self.fault == "forward":
            return output.masked_fill(wrong, math.nan)
        return Poison.apply(output, wrong)


@pytest.mark.parametrize("fault", ["forward", "gradient"])
@pytest.mark.parametrize("kind", ["latent-lm", "dit"])
def test_a_band_of_timesteps_is_named_with_its_examples(kind, fault):
    task, batch = make_task(kind), make_batch()
    owner = task.model.head if kind == "latent-lm" else task.model
    owner.timestep_embedding = faulty = FaultyTimesteps(owner.timestep_embedding, fault)
    for parameter in task.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    (turn,) = task.turns(0)
    found = examine(task, turn, [batch])
    t = faulty.seen[0]
    wrong = (t >= 250) & (t < 500)
    rows = wrong if kind == "dit" else wrong.unflatten(1, (4, 6)).any(2).any(0)
    name = "model.head.timestep_embedding" if kind == "latent-lm" else "model.timestep_embedding"
    keys = tuple(key for key, is_wrong in zip("abcd", rows, strict=True) if is_wrong)
    assert 0 < wrong.sum() < wrong.numel()
    assert found == Culprit(fault, name, keys, ("t250-499",))


@pytest.mark.parametrize("fault", ["forward", "gradient"])
def test_a_state_that_fails_is_named_with_the_example_it_predicts_a_latent_of(fault):
    """States are one after the other, row by row, and errors are those of each with its noises."""
    task, batch = make_task("latent-lm"), make_batch()
    task.model.head.condition_norm = Faulty(nn.Identity(), fault, rows=(7,))
    (turn,) = task.turns(0)
    found = examine(task, turn, [batch])
    assert (found.cause, found.name) == (fault, "model.head.condition_norm")
    assert found.keys == ("b",), "the eighth of the latents, six of which make an image"


@pytest.mark.parametrize("fault", ["forward", "gradient"])
@pytest.mark.parametrize("turn", [0, 1])
def test_an_image_that_fails_in_a_tokenizer_or_its_critic_is_named(fault, turn):
    task, batch = tiny_vae_task.task(gan_weight=1.0, gan_start_step=0), tiny_vae_task.batch()
    taken = task.turns(0)[turn]
    if turn == 0:
        layers = task.vae.decoder.layers
        layers[-1] = Faulty(layers[-1], fault, rows=(2,))
        expected = f"vae.decoder.layers.{len(layers) - 1}"
    else:
        name, last = list(task.critic.named_children())[-1]
        setattr(task.critic, name, Faulty(last, fault, rows=(2, 6)))
        expected = f"critic.{name}"
    found = examine(task, taken, [batch])
    assert found == Culprit(fault, expected, ("2",))


def test_what_several_processes_find_is_one_answer(monkeypatch):
    found = [
        None,
        Culprit("gradient", "net.head", ("a",)),
        Culprit("forward", "net.stem", ("b",), ("t0-249",)),
        Culprit("forward", "net.stem", ("c", "b"), ("t0-249", "t250-499")),
    ]
    assert culprit_module._merged(found) == Culprit(
        "forward", "net.stem", ("b", "c"), ("t0-249", "t250-499")
    )
    assert culprit_module._merged([None, None]) is None
