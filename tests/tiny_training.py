"""Two small real tasks and a stream to train them on, for the tests of training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentlm_core.draws import WHOLE, Rows, Share
from latentlm_core.files import sha256_file
from latentlm_core.runtime import generator
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.runlog import read_metrics
from latentlm_core.training.tasks import Term, Terms, Turn
from latentlm_core.training.trainer import Trainer
from latentlm_core.training.trainer_config import TrainerConfig

TIMING = {"samples_per_second", "tokens_per_second", "flops_utilisation", "data_wait_share"}


@dataclass
class Points:
    x: Tensor
    y: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Points":
        return Points(self.x.to(device), self.y.to(device), self.keys)

    def share(self, index: int, count: int) -> "Points":
        rows = Rows.of_share(len(self), index, count)
        own = slice(rows.start, rows.stop)
        return Points(self.x[own], self.y[own], self.keys[own])


@dataclass
class Stream:
    """Batch k is a function of k; ``faults`` says what happens, once, when batch k is asked for."""

    size: int = 8
    parts: int = 1
    held_out_batches: int = 3
    faults: dict[int, BaseException] = field(default_factory=dict)
    spoil: dict[int, float] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def batches(self, numbers: Iterable[int], share: Share = WHOLE) -> Iterator[Points]:
        for index in numbers:
            self.asked.append(index)
            if index in self.faults:
                raise self.faults.pop(index)
            batch, part = divmod(index, self.parts)
            whole = self._batch(batch)
            size = self.size // self.parts
            rows = slice(part * size, (part + 1) * size)
            x = whole.x[rows] * self.spoil.get(index, 1.0)
            yield Points(x, whole.y[rows], whole.keys[rows]).share(*share)

    def held_out(self) -> Iterator[Points]:
        for index in range(self.held_out_batches):
            self.asked.append(-1)
            yield self._batch(-1 - index)

    def _batch(self, index: int) -> Points:
        x = torch.randn(self.size, 2, generator=generator("points", index))
        y = x @ torch.tensor([3.0, -2.0]) + 0.5
        return Points(x, y, tuple(f"b{index}-{row}" for row in range(self.size)))


class Regression:
    """Mean squared error, an absolute error over the points with x_0 > 0, and noise on x."""

    name = "regression"

    def __init__(self, noise: float = 0.0, knows_counts: bool = False) -> None:
        self.net = nn.Linear(2, 1)
        nn.init.constant_(self.net.weight, 0.5)
        nn.init.constant_(self.net.bias, 0.25)
        self.noise = noise
        self.knows_counts = knows_counts
        self.output_dtype: torch.dtype | None = None
        self.events: list[str] = []

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    @property
    def exported(self) -> nn.Module:
        return self.net

    def turns(self, step: int) -> list[Turn]:
        counts = self._counts if self.knows_counts else None
        return [Turn("main", self.net, self._loss, {"squared": 1.0, "right": 0.3}, counts)]

    def validate(self, batch: Points, rng: torch.Generator) -> Terms:
        error = self.net(batch.x).squeeze(1) - batch.y
        draw = torch.randn((), generator=rng)
        return {
            "squared": Term(error.square().sum(), len(error)),
            "weight": Term(self.net.weight.sum(), 1),
            "draw": Term(draw, 1),
        }

    def health(self, figures: dict[str, float]) -> list[str]:
        return [f"The loss is {figures['loss/main']:.3f}."] if "loss/main" in figures else []

    def _counts(self, batch: Points) -> dict[str, int]:
        return {"squared": len(batch), "right": int((batch.x[:, 0] > 0).sum())}

    def _loss(self, batch: Points, rng: torch.Generator) -> Terms:
        self.events.append("loss")
        x = batch.x + self.noise * torch.randn(batch.x.shape, generator=rng)
        output = self.net(x)
        self.output_dtype = output.dtype
        error = output.squeeze(1).float() - batch.y
        right = batch.x[:, 0] > 0
        squared = error.square().sum()
        if squared.requires_grad:
            squared.register_hook(lambda _: self.events.append("backward"))
        return {
            "squared": Term(squared, len(error)),
            "right": Term(error.abs()[right].sum(), int(right.sum())),
            "largest": Term(error.abs().max().detach(), 1),
        }


class Adversarial:
    """A generator with batch statistics, and a critic that joins at step 3."""

    name = "adversarial"

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(2, 6), nn.BatchNorm1d(6, track_running_stats=True), nn.GELU(), nn.Linear(6, 2)
        )
        self.critic = nn.Sequential(nn.Linear(2, 6), nn.LeakyReLU(), nn.Linear(6, 1))

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net, "critic": self.critic}

    @property
    def exported(self) -> nn.Module:
        return self.net

    def turns(self, step: int) -> list[Turn]:
        generating = Turn("generator", self.net, self._generate, {"copy": 1.0, "gan": 0.1})
        if step < 3:
            return [generating]
        return [generating, Turn("critic", self.critic, self._judge, {"hinge": 1.0}, start=3)]

    def validate(self, batch: Points, rng: torch.Generator) -> Terms:
        return {"copy": Term((self.net(batch.x) - batch.x).square().sum(), batch.x.numel())}

    def health(self, figures: dict[str, float]) -> list[str]:
        return []

    def _generate(self, batch: Points, rng: torch.Generator) -> Terms:
        output = self.net(batch.x + 0.1 * torch.randn(batch.x.shape, generator=rng))
        return {
            "copy": Term((output - batch.x).square().sum(), batch.x.numel()),
            "gan": Term(-self.critic(output).sum(), len(batch)),
        }

    def _judge(self, batch: Points, rng: torch.Generator) -> Terms:
        with torch.no_grad():
            fake = self.net(torch.randn(batch.x.shape, generator=rng))
        real, fake = self.critic(batch.x), self.critic(fake)
        return {"hinge": Term((F.relu(1 - real) + F.relu(1 + fake)).sum(), len(batch))}


@dataclass
class Listener:
    """Keeps what it hears; ``on_advance`` is told how many steps were reported."""

    on_advance: Callable[[int], None] = lambda step: None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    step: int = 0

    @contextmanager
    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Iterator["Listener"]:
        self.step = done
        yield self

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.step += amount
        self.on_advance(self.step)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def make(
    folder: Path,
    task: Any = None,
    stream: Any = None,
    *,
    progress: Any = None,
    optimizer: OptimizerConfig | None = None,
    run_config: dict[str, Any] | None = None,
    schema: dict[str, Any] | None = None,
    **config: Any,
) -> Trainer:
    settings = {"total_steps": 13, "log_every": 4, "save_every": 5, "precision": "float32"} | config
    optimizer = optimizer or OptimizerConfig(lr=0.02, warmup_steps=2)
    return Trainer(
        TrainerConfig(**settings),
        task or Regression(),
        stream or Stream(),
        dict.fromkeys(("main", "generator", "critic"), optimizer),
        folder,
        torch.device("cpu"),
        {"data": "points", "sizes": (2, 1)} if run_config is None else run_config,
        progress or Listener(),
        schema or {},
    )


def traces(folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Everything a run leaves, but for what a clock decides."""
    last = max((folder / "checkpoints").iterdir())
    hashes = {path.name: sha256_file(path) for path in last.glob("*.safetensors")}
    rows = read_metrics(folder / "metrics.jsonl")
    return hashes, [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def noisy() -> Regression:
    return Regression(noise=0.3)
