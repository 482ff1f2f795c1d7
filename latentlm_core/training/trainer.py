"""The training loop: the only one, whatever is trained.

    every step            batches -> Stepper.step (all turns) -> average of the weights
    every log_every       one row of metrics.jsonl, one progress report, the task's health
    every validate_every  the average's terms on the held-out batches, in the same row
    every save_every      a checkpoint

Notable choices:
- resuming is calling the same thing again. On one CPU process the resumed run equals the
  undisturbed one bit for bit: batch k and all randomness are functions of the seed and k, and the
  sums of a half-done log interval travel with the checkpoint;
- Ctrl-C and SIGTERM save at the next boundary between steps; asking twice leaves at once;
- on a GPU the host reads figures only when a row is due, and after 64 steps at the latest. A loss
  that is not finite is noticed then, but has been kept from the weights from the start.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.errors import ArtifactError, ConfigError, TrainingError
from latentlm_core.files import locked
from latentlm_core.progress import SILENT, Progress
from latentlm_core.runtime import evaluating, generator
from latentlm_core.training.checkpoint import CheckpointStore, differences
from latentlm_core.training.hardware import (
    Precision,
    autocast_dtype,
    compile_blocks,
    require_compiler,
)
from latentlm_core.training.interrupt import StopRequest, deferred_signals
from latentlm_core.training.optim import Ema, OptimizerConfig
from latentlm_core.training.runlog import Means, Pace, RunLog, last_figures
from latentlm_core.training.state import TrainState
from latentlm_core.training.step import GUARDED, Stepper
from latentlm_core.training.tasks import Batch, BatchStream, Task

MAX_LAG = 64
"""Steps after which the host looks at the figures on the device at the latest."""

SANITY_BATCHES = 2
"""Held-out batches validated before the first step: what fails there should fail at once."""


class TrainerConfig(Config):
    """How long and how a run trains. The first group may change when a run is resumed."""

    log_every: int = Field(default=50, ge=1)
    """Steps between rows of metrics.jsonl."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates at the end only."""
    save_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
    compile: bool = False
    """Compile the networks' blocks."""

    total_steps: int = Field(ge=1)
    """Optimizer updates of the run; may change on resuming where all schedules are constant."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients make one update."""
    seed: int = 0
    """Decides all randomness in the losses."""
    precision: Precision = "auto"
    """float32, bfloat16 (autocast), or auto: bfloat16 where the hardware has it. A run goes on in
    the one that it began with."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Limit of the decay of the weights' average."""


FREE_KEYS = frozenset(
    f"trainer.{name}"
    for name in ("log_every", "validate_every", "save_every", "keep_checkpoints", "compile")
)
"""Keys of a run's configuration that may change when it is resumed."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to.

    Attributes:
        step: optimizer updates done.
        samples_seen: examples trained on.
        seconds: time spent training, over all sessions of the run.
        figures: the newest value of each figure in the log.
        resumed_from: the step of the checkpoint that this call began with, if there was one.
        metrics_path: the log.
    """

    step: int
    samples_seen: int
    seconds: float
    figures: dict[str, float | None]
    resumed_from: int | None
    metrics_path: Path


class Trainer:
    """Trains a task in a run folder, from its newest checkpoint if there is one.

    One trainer runs once: to go on, make another with the same arguments.

    Args:
        config: how long and how.
        task: what; its modules are moved to ``device``.
        stream: the batches.
        optimizers: by the name of the turn.
        folder: of the run; receives ``metrics.jsonl`` and ``checkpoints/``.
        device: where to train.
        run_config: everything else that decides the result, as plain values. It is saved with
            each checkpoint, and a run is not resumed with another one.
        progress: listener.

    Raises:
        ConfigError: a turn of the task has no optimizer, or blocks are to be compiled and there
            is no compiler.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        stream: BatchStream,
        optimizers: Mapping[str, OptimizerConfig],
        folder: Path,
        device: torch.device,
        run_config: Mapping[str, Any],
        progress: Progress = SILENT,
    ) -> None:
        self.config = config
        self.task = task
        self.stream = stream
        self.folder = folder
        self.device = device
        self.progress = progress
        dtype = autocast_dtype(config.precision, device)
        self._run_config = _plain(config, dtype, optimizers, run_config)
        self._free = FREE_KEYS
        if all(optimizer.schedule == "constant" for optimizer in optimizers.values()):
            self._free |= {"trainer.total_steps"}

        if config.compile:
            require_compiler()
        for module in task.modules.values():
            module.to(device)
            if config.compile:
                compile_blocks(module)
        turns = [turn for step in (0, config.total_steps - 1) for turn in task.turns(step)]
        for turn in turns:
            if turn.name not in optimizers:
                raise ConfigError(f"The turn {turn.name} of the task {task.name} has no optimizer.")
            turn.module.train()
        stepper = Stepper(
            {turn.name: turn.module for turn in turns},
            optimizers,
            total_steps=config.total_steps,
            seed=config.seed,
            device=device,
            dtype=dtype,
        )
        ema = Ema(task.exported, config.ema_decay)
        self._state = TrainState(task.modules, stepper, ema, Means())
        self._store = CheckpointStore(folder / "checkpoints", config.keep_checkpoints)
        self._pace = Pace()
        self._unread: list[tuple[int, tuple[str, ...]]] = []
        self._warned: set[str] = set()
        self._saved_step = 0
        self._has_run = False

    def run(self) -> TrainResult:
        """Train to the end; afterwards ``task.exported`` holds the averaged weights.

        A run that is finished returns at once.

        Raises:
            BusyError: another process trains in the folder.
            ArtifactError: a checkpoint of another configuration is there, or writing failed.
            CorruptFileError: the newest checkpoint or the log is damaged.
            TrainingError: a loss or gradient is not finite; the checkpoints are from before.
            KeyboardInterrupt: Ctrl-C, after saving.
            SystemExit: SIGTERM, after saving.
        """
        if self._has_run:
            raise RuntimeError("a trainer runs once; make another to go on")
        self._has_run = True
        with locked(self.folder), deferred_signals() as stop:
            state, resumed_from = self._state, self._resume()
            log = RunLog(self.folder / "metrics.jsonl", state.step)
            if state.step == 0:
                self._validate(SANITY_BATCHES)
            if state.step < self.config.total_steps:
                self._train(log, stop)
            state.ema.copy_to_module()
            return TrainResult(
                step=state.step,
                samples_seen=state.samples_seen,
                seconds=state.seconds,
                figures=last_figures(log.path),
                resumed_from=resumed_from,
                metrics_path=log.path,
            )

    def _train(self, log: RunLog, stop: StopRequest) -> None:
        config, state = self.config, self._state
        begun = time.perf_counter() - state.seconds
        batches = self.stream.batches(state.step * config.accumulate)
        is_whole = True
        with self.progress.bar(self.task.name, config.total_steps, "steps", state.step) as bar:
            self._pace.restart()
            try:
                while state.step < config.total_steps:
                    parts = self._next(batches)
                    is_whole = False
                    self._update(parts)
                    shown = self._report(log)
                    state.seconds = time.perf_counter() - begun
                    is_whole = True
                    if self._is_due(config.save_every):
                        self._save()
                    bar.advance(1, **shown)
                    stop.obey()
            except (KeyboardInterrupt, SystemExit):
                if is_whole and not stop.urgent:
                    self._save()
                    self.progress.note(f"Stopped after step {state.step}; run it again to go on.")
                raise

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        """The parts of the next step's batch, on the device."""
        before = time.perf_counter()
        parts = [next(batches).to(self.device) for _ in range(self.config.accumulate)]
        self._pace.waited += time.perf_counter() - before
        return parts

    def _update(self, parts: list[Batch]) -> None:
        state = self._state
        turns = self.task.turns(state.step)
        state.means.add(state.stepper.step(turns, parts, state.step))
        self._unread.append((state.step, tuple(key for part in parts for key in part.keys)))
        if self.device.type == "cpu" or len(self._unread) == MAX_LAG:
            self._read()
        state.ema.update(state.step)
        num_samples = sum(len(part) for part in parts)
        self._pace.samples += num_samples
        state.samples_seen += num_samples
        state.step += 1

    def _read(self) -> None:
        """Look at the figures of the steps since the last look: this makes the host wait."""
        unread, self._unread = self._unread, []
        for (step, keys), figures in zip(unread, self._state.means.fetch(), strict=True):
            guarded = (value for name, value in figures.items() if name.startswith(GUARDED))
            if not all(map(math.isfinite, guarded)):
                raise _not_finite(step, keys, figures)

    def _report(self, log: RunLog) -> dict[str, float]:
        """Write the row of this step, if one is due; what of it belongs on a progress bar."""
        state, row = self._state, dict[str, float | None]()
        turns = self.task.turns(state.step - 1)
        if self._is_due(self.config.log_every):
            self._read()
            row |= state.means.take()
            row |= state.stepper.learning_rates(turns, state.step - 1)
            row |= self._pace.figures()
        if self._is_due(self.config.validate_every):
            row |= self._validate()
        if not row:
            return {}
        written = log.write(state.step, {"samples_seen": state.samples_seen, **row})
        self._warn(written)
        self._pace.restart()
        loss = f"loss/{turns[0].name}"
        return {"loss": written[loss]} if loss in written else {}

    def _is_due(self, every: int) -> bool:
        is_last = self._state.step == self.config.total_steps
        return is_last or (every > 0 and self._state.step % every == 0)

    def _validate(self, limit: int | None = None) -> dict[str, float | None]:
        """Means of the average's terms over at most ``limit`` held-out batches."""
        means = Means()
        with self._state.ema.applied(), evaluating(*self.task.modules.values()):
            for index, batch in enumerate(islice(self.stream.held_out(), limit)):
                rng = generator(self.config.seed, "validate", index, device=self.device)
                with self._state.stepper.autocast():
                    means.add(self.task.validate(batch.to(self.device), rng))
        means.fetch()
        return {f"validation/{name}": value for name, value in means.take().items()}

    def _warn(self, figures: Mapping[str, float]) -> None:
        """Pass on the task's warnings, each once even where its numbers change."""
        for warning in self.task.health(figures):
            kind = re.sub(r"[\d.]+", "#", warning)
            if kind not in self._warned:
                self._warned.add(kind)
                self.progress.warn(warning)

    def _save(self) -> None:
        if self._state.step == self._saved_step:
            return
        self._read()
        self._state.save(self._store, self._run_config)
        self._saved_step = self._state.step

    def _resume(self) -> int | None:
        """Take up the newest checkpoint; its step, None where there is none."""
        checkpoint = self._store.latest()
        if checkpoint is None:
            return None
        changed = differences(checkpoint.state.config, self._run_config, self._free)
        if changed:
            raise ArtifactError(
                f"{self.folder} was started with another configuration: {'; '.join(changed)}.",
                hint=_way_out(checkpoint.state.config, self._run_config),
            )
        self._state.restore(checkpoint)
        self._saved_step = self._state.step
        self.progress.note(f"{self.folder} continues after step {self._state.step}.")
        return self._state.step


def _plain(
    config: TrainerConfig,
    dtype: torch.dtype,
    optimizers: Mapping[str, OptimizerConfig],
    run_config: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole configuration of the run as it comes back from JSON, its precision settled."""
    whole = {
        **run_config,
        "trainer": config.to_dict() | {"precision": str(dtype).removeprefix("torch.")},
        "optimizers": {name: optimizer.to_dict() for name, optimizer in optimizers.items()},
    }
    return json.loads(json.dumps(whole))  # type: ignore[no-any-return]


def _way_out(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What to do about a run of another configuration.

    Precision is named because it may differ where the user changed nothing but the machine.
    """
    there, here = (config["trainer"]["precision"] for config in (saved, current))
    example = f" (--set trainer.precision={there})" if there != here else ""
    return f"Use the settings it was started with{example}, or another --out."


def _not_finite(step: int, keys: tuple[str, ...], figures: Mapping[str, float]) -> TrainingError:
    values = ", ".join(f"{name} = {value:.4g}" for name, value in figures.items())
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    examples = f"; its examples: {shown}" if keys else ""
    return TrainingError(
        f"Step {step + 1} is not finite and was not applied ({values}{examples}).",
        hint="The last checkpoint is from before; lower the learning rate or train in float32.",
    )
