"""The training loop: the only one, whatever is trained.

    every step            batches -> Stepper.step (all turns) -> average of the weights
    every log_every       one row of metrics.jsonl, one progress report, the task's health
    every validate_every  the average's terms on the held-out batches, in the same row
    every save_every      a checkpoint

Notable choices:
- resuming is calling the same thing again. On one CPU process the resumed run equals the
  undisturbed one bit for bit: batch k and all randomness are functions of the seed and k, and the
  sums of a half-done log interval travel with the checkpoint;
- several processes train one model: they take the same steps, the main one alone writes and
  reports (``training.parallel``);
- Ctrl-C and SIGTERM save at the next boundary between steps, that of the same step in every
  process; asking twice leaves at once;
- on a GPU the host reads figures only when a row is due, and after 64 steps at the latest. A loss
  that is not finite is noticed then, but has been kept from the weights from the start; what is
  done about it is ``training.bad_numbers``.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from latentlm_core.errors import ConfigError
from latentlm_core.files import locked
from latentlm_core.processes import current
from latentlm_core.progress import SILENT, Progress
from latentlm_core.training.bad_numbers import BadNumbers, GoBack, bad_turn
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.feed import Feed
from latentlm_core.training.hardware import (
    autocast_dtype,
    compile_blocks,
    keep_freed_memory,
    recompute_blocks,
    require_compiler,
)
from latentlm_core.training.interrupt import StopRequest, deferred_signals
from latentlm_core.training.optim import Ema, OptimizerConfig
from latentlm_core.training.pace import Pace
from latentlm_core.training.parallel import StepShare, gathered_dtype, mesh_of, shard
from latentlm_core.training.peak import peak_flops
from latentlm_core.training.run_config import Schema, require_same
from latentlm_core.training.runlog import Means, RunLog, figures_of, last_figures, shown_figures
from latentlm_core.training.state import TrainState
from latentlm_core.training.step import Stepper
from latentlm_core.training.tasks import Batch, BatchStream, Task, TellsWork, Work
from latentlm_core.training.trainer_config import FREE_KEYS, TrainerConfig, plain_config
from latentlm_core.training.validation import objective, validate

MAX_LAG = 64
"""Steps after which the host looks at the figures on the device at the latest."""

SANITY_BATCHES = 2
"""Held-out batches validated before the first step: what fails there should fail at once."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to.

    Attributes:
        step: optimizer updates done.
        samples_seen: examples trained on.
        seconds: time spent training, over all sessions of the run.
        figures: the newest value of each figure in the log.
        speed: of this call, by the names in the log (``training.pace``); empty if it took no step.
        resumed_from: the step of the checkpoint that this call began with, if there was one.
        metrics_path: the log.
    """

    step: int
    samples_seen: int
    seconds: float
    figures: dict[str, float | None]
    speed: dict[str, float | None]
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
        schema: what parts of ``run_config`` were made of, by its keys: a run goes on, too, that
            was started before a field of theirs existed.

    Raises:
        ConfigError: a turn of the task has no optimizer, blocks are to be compiled and there is no
            compiler, or this many processes cannot share a step.
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
        schema: Mapping[str, Schema] = MappingProxyType({}),
    ) -> None:
        self.config = config
        self.task = task
        self.folder = folder
        self.device = device
        self._processes = processes = current()
        share = StepShare.of(config.accumulate, processes)
        self._feed = Feed(stream, share, device)
        self.progress = progress if processes.is_main else SILENT
        dtype = autocast_dtype(config.precision, device)
        self._run_config = plain_config(config, dtype, optimizers, run_config)
        self._schema = {"trainer": config, "optimizers": optimizers, **schema}
        self._free = FREE_KEYS
        if all(optimizer.schedule == "constant" for optimizer in optimizers.values()):
            self._free |= {"trainer.total_steps"}

        if config.compile:
            require_compiler()
        keep_freed_memory(device)
        mesh = mesh_of(config.parallel, config.shard_size, device, processes)
        for module in task.modules.values():
            if config.recompute:
                recompute_blocks(module)
            if config.compile:
                compile_blocks(module)
            if mesh is not None:
                shard(module, mesh, gathered_dtype(dtype, device))
            module.to(device)
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
            processes=processes,
            first=share.indices.start,
            skips=config.on_bad_numbers == "skip",
            reduce_each_batch=config.reduce_each_batch,
        )
        ema = Ema(task.exported, config.ema_decay)
        self._state = TrainState(task.modules, stepper, ema, Means())
        is_async = device.type == "cuda" if config.async_save == "auto" else config.async_save
        self._store = CheckpointStore(
            folder / "checkpoints",
            config.keep_checkpoints,
            every=config.keep_every,
            best=config.keep_best,
            go_back=config.save_every if config.on_bad_numbers == "rollback" else 0,
            is_async=is_async,
        )
        self._pace = Pace(lambda: processes.size * peak_flops(device, dtype))
        self._unread: list[int] = []
        policy, bound = config.on_bad_numbers, config.max_bad_steps
        self._bad = BadNumbers(folder, policy, bound, task, stepper, self._store, self.progress)
        self._warned: set[str] = set()
        self._saved_step = 0
        self._score: tuple[int, float | None] = (0, None)
        self._has_run = False

    def run(self, finish: Callable[[TrainResult], None] = lambda result: None) -> TrainResult:
        """Train to the end; afterwards ``task.exported`` holds the averaged weights.

        A run that is finished returns at once. Every process calls this and gets the same result.

        Args:
            finish: called then, while the folder is still held against other processes.

        Raises:
            BusyError: another process trains in the folder.
            ArtifactError: a checkpoint of another configuration is there, or writing failed.
            CorruptFileError: the newest checkpoint or the log is damaged.
            TrainingError: a loss or gradient is not finite, and that is not to be passed over; the
                checkpoints are from before.
            KeyboardInterrupt: Ctrl-C, after saving.
            SystemExit: SIGTERM, after saving.
        """
        if self._has_run:
            raise RuntimeError("a trainer runs once; make another to go on")
        self._has_run = True
        with self._processes.in_main(locked(self.folder)):
            result = self._run()
            finish(result)
        return result

    def _run(self) -> TrainResult:
        processes, path = self._processes, self.folder / "metrics.jsonl"
        with deferred_signals(processes) as stop, self._store, closing(self._feed):
            state, resumed_from = self._state, self._resume()
            self._bad.begin(resumed_from)
            log = RunLog(path, state.step) if processes.is_main else None
            if state.step == 0:
                self._validate(SANITY_BATCHES)
            if resumed_from is None and self.config.on_bad_numbers == "rollback":
                self._state.save(self._store, self._run_config)
            if state.step < self.config.total_steps:
                self._train(log, stop)
            stop.obey()
            state.ema.copy_to_module()
            result = partial(
                TrainResult,
                step=state.step,
                samples_seen=state.samples_seen,
                seconds=state.seconds,
                speed=self._pace.overall(),
                resumed_from=resumed_from,
                metrics_path=path,
            )
            return processes.once(lambda: result(figures=last_figures(path)))

    def _train(self, log: RunLog | None, stop: StopRequest) -> None:
        config, state = self.config, self._state
        begun = time.perf_counter() - state.seconds
        self._seek()
        is_whole = True
        with self.progress.bar(self.task.name, config.total_steps, "steps", state.step) as bar:
            self._pace.restart()
            try:
                while state.step < config.total_steps:
                    before, parts = state.step, self._take()
                    is_whole = False
                    try:
                        self._update(parts)
                        shown = self._report(log)
                        state.seconds = time.perf_counter() - begun
                        is_whole = True
                        if self._is_due(config.save_every):
                            self._save()
                    except GoBack:
                        is_whole = False
                        self._go_back(log)
                        self._seek()
                        shown = {}
                        is_whole = True
                    bar.advance(state.step - before, **shown)
                    stop.obey()
            except (KeyboardInterrupt, SystemExit):
                if is_whole and not stop.urgent:
                    with suppress(GoBack):  # it is remembered, and done when the run goes on
                        self._save()
                        self._store.wait()
                        told = f"Stopped after step {state.step}; run it again to go on."
                        self.progress.note(told)
                raise

    def _seek(self) -> None:
        """Go on with the batches of the state's step."""
        self._feed.seek(self._state.step + self._bad.left_out)

    def _take(self) -> list[Batch]:
        """This process's parts of the next step's batch, on the device."""
        before = time.perf_counter()
        parts = self._feed.take()
        self._pace.wait(time.perf_counter() - before)
        return parts

    def _update(self, parts: list[Batch]) -> None:
        state = self._state
        turns = self.task.turns(state.step)
        state.means.add(state.stepper.step(turns, parts, state.step))
        self._unread.append(state.step)
        if self.device.type == "cpu" or len(self._unread) == MAX_LAG:
            self._read()
        state.ema.update(state.step)
        own = [(len(part), self._work(part)) for part in parts]
        counts = torch.tensor([[size, work.tokens, work.flops] for size, work in own]).sum(0)
        samples, tokens, flops = self._processes.sum(counts).tolist()
        self._pace.count(samples, Work(tokens, flops))
        state.samples_seen += samples
        state.step += 1

    def _work(self, part: Batch) -> Work:
        return self.task.work(part) if isinstance(self.task, TellsWork) else Work()

    def _read(self) -> None:
        """Look at the figures of the steps since the last look: this makes the host wait."""
        unread, self._unread = self._unread, []
        means = self._state.means
        for step, sums in zip(unread, means.withdraw(), strict=True):
            figures = figures_of(sums)
            turn = bad_turn(self.task.turns(step), figures)
            if turn is None:
                means.count(sums)
                continue
            parts = self._feed.again(step + self._bad.left_out)
            self._bad.face(turn, step, figures, parts, now=unread[-1] + 1)

    def _go_back(self, log: RunLog | None) -> None:
        """Restore the newest checkpoint, and the log as it was then."""
        checkpoint = self._store.latest()
        assert checkpoint is not None, "a run that may go back begins with a checkpoint"
        self._state.restore(checkpoint)
        self._saved_step = self._state.step
        if log is not None:
            RunLog(log.path, self._state.step)
        self._pace.restart()

    def _report(self, log: RunLog | None) -> dict[str, float]:
        """Write the row of this step, if one is due; what of it belongs on a progress bar."""
        state, row = self._state, dict[str, float | None]()
        turns = self.task.turns(state.step - 1)
        if self._is_due(self.config.log_every):
            self._read()
            row |= state.means.take()
            row |= state.stepper.learning_rates(turns, state.step - 1)
            row |= self._pace.figures() | self._bad.figures()
        if self._is_due(self.config.validate_every):
            row |= self._validate()
            self._score = (state.step, objective(turns[0], row))
        if not row or log is None:
            return {}
        written = log.write(state.step, {"samples_seen": state.samples_seen, **row})
        self._warn(written)
        self._pace.restart()
        return shown_figures(turns[0], written)

    def _is_due(self, every: int) -> bool:
        is_last = self._state.step == self.config.total_steps
        return is_last or (every > 0 and self._state.step % every == 0)

    def _validate(self, limit: int | None = None) -> dict[str, float | None]:
        """Means of the average's terms over at most ``limit`` held-out batches."""
        with self._state.ema.applied():
            means = validate(
                self.task,
                self._feed.held_out(),
                self._state.stepper,
                self.config.seed,
                self.device,
                self._processes,
                limit,
            )
        return {f"validation/{name}": value for name, value in means.items()}

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
        step, score = self._score
        known = score if step == self._state.step else None
        self._state.save(self._store, self._run_config, known)
        self._saved_step = self._state.step

    def _resume(self) -> int | None:
        """Take up the newest checkpoint; its step, None where there is none."""
        checkpoint = self._store.latest()
        if checkpoint is None:
            return None
        saved = checkpoint.state.config
        require_same(saved, self._run_config, self._schema, self._free, self.folder)
        self._state.restore(checkpoint)
        self._saved_step = self._state.step
        self._store.tidy()
        self.progress.note(f"{self.folder} continues after step {self._state.step}.")
        return self._state.step
