"""What a run does about steps whose loss or gradient is not finite, and what it remembers of them.

    stop        the run ends; its weights are those of before the step
    skip        the step changes nothing and the run goes on; too many in a row end it
    rollback    the last regular checkpoint (of a multiple of ``save_every`` steps) is restored, and
                the run goes on from there with the batches after the bad step's; too many times
                back to the same checkpoint end it

Every bad step is examined (``training.culprit``) and reported in ``bad-numbers.json``, whose first
fields decide which batches a step takes:

    a run at step s has left out the batches of every roll-back to a checkpoint up to s

Notable choices:
- a skipped step is an update with learning rate 0: the number of steps, the schedule and the
  average's decay go on, the optimizer's own count does not;
- a roll-back leaves out all batches from the checkpoint to the bad step, not the last one alone:
  taking the same steps again would lead to the same place;
- the file is written before anything follows from it. A run that is taken up again at a checkpoint
  forgets what is ahead of it, for that will happen again, so it equals the undisturbed one. For the
  same reason nothing goes back to a checkpoint that an interruption left: those after the regular
  one are dropped first;
- skipping does not help where the weights themselves are not finite: that ends the run.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

from latentlm_core.errors import TrainingError
from latentlm_core.files import write_json
from latentlm_core.processes import current
from latentlm_core.progress import Progress
from latentlm_core.training.bad_steps import (
    DAMAGE,
    FILE_NAME,
    MAX_KEYS,
    Action,
    BadStep,
    History,
    describe,
    read_history,
    way_out,
)
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.culprit import Culprit, find_culprit
from latentlm_core.training.step import GUARDED, Stepper
from latentlm_core.training.tasks import Batch, Task, Turn

Policy = Literal["stop", "skip", "rollback"]


class GoBack(Exception):  # noqa: N818
    """The newest checkpoint is to be restored: the trainer's own signal, caught by its loop."""


class BadNumbers:
    """The policy of a run and its memory.

    Args:
        folder: of the run.
        policy: what to do.
        bound: skipped steps in a row, or returns to one checkpoint, that are allowed.
        task: what is trained.
        stepper: holder of its optimizers.
        store: the run's checkpoints.
        progress: hears of what is skipped and rolled back.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        bound: int,
        task: Task,
        stepper: Stepper,
        store: CheckpointStore,
        progress: Progress,
    ) -> None:
        self.path = folder / FILE_NAME
        self._policy = policy
        self._bound = bound
        self._task = task
        self._stepper = stepper
        self._store = store
        self._progress = progress
        self._history = History()

    @property
    def left_out(self) -> int:
        """Steps' worth of batches that roll-backs left out."""
        return sum(back.step - back.to for back in self._history.roll_backs)

    def begin(self, step: int | None) -> None:
        """Take up the history of a run at the checkpoint of ``step``; None begins a new run.

        Raises:
            CorruptFileError: the file is damaged.
            ArtifactError: it cannot be written.
        """
        there = current().once(lambda: read_history(self.path))
        self._history = History() if there is None or step is None else there.until(step)
        if there is not None and there != self._history:
            self._write()

    def figures(self) -> dict[str, float | None]:
        """``skipped_steps`` for the log: steps so far whose batches changed nothing."""
        num_skipped = len(self._history.skipped) + self.left_out
        return {"skipped_steps": num_skipped} if num_skipped or self._policy != "stop" else {}

    def face(
        self,
        turn: Turn,
        step: int,
        figures: Mapping[str, float],
        batches: Sequence[Batch],
        *,
        now: int,
    ) -> None:
        """Report a bad step and do what the policy says; to return is to leave it out.

        Args:
            turn: that is not finite.
            step: updates done before it.
            figures: of the step.
            batches: this process's parts of it, on the device.
            now: steps taken when it was noticed.

        Raises:
            GoBack: the newest checkpoint is to be restored.
            TrainingError: the run ends.
            ArtifactError: the report cannot be written.
        """
        stepper = self._stepper
        culprit = find_culprit(
            self._task,
            turn,
            batches,
            stepper.tensors(),
            lambda it: stepper.again(it, batches, step),
        )
        gathered = current().gather([key for batch in batches for key in batch.keys])
        examples = [key for keys in gathered for key in keys]
        back = self._store.way_back() if self._policy == "rollback" else None
        action, reason = self._decide(step, culprit, back)
        report = BadStep(
            step=step + 1,
            action=action,
            turn=turn.name,
            cause=culprit.cause,
            name=culprit.name,
            timesteps=culprit.timesteps,
            keys=culprit.keys[:MAX_KEYS],
            examples=tuple(examples[:MAX_KEYS]),
            num_examples=len(examples),
            figures={name: f"{value:.4g}" for name, value in figures.items()},
            place=step + self.left_out,
            noticed=now,
        )
        to = back if action == "rolled back" else None
        if to is not None:
            self._store.drop_after(to)
        self._history = self._history.with_report(report, to)
        self._write()
        told = describe(report)
        if action == "stopped":
            raise TrainingError(f"{told}{reason}.", hint=f"{way_out(report)} See {self.path}.")
        if to is not None:
            self._progress.warn(f"{told}; back to step {to}, without the batches up to here.")
            raise GoBack
        self._progress.warn(f"{told}; it is skipped.")

    def _decide(self, step: int, culprit: Culprit, to: int | None) -> tuple[Action, str]:
        """What to do, and why the run stops where the policy would have it go on."""
        if self._policy == "stop":
            return "stopped", ""
        if self._policy == "rollback":
            times = sum(back.to == to for back in self._history.roll_backs)
            if times < self._bound:
                return "rolled back", ""
            return "stopped", f"; the run went back to step {to} {times} times already"
        if culprit.cause in DAMAGE:
            return "stopped", "; skipping steps does not mend that"
        skipped = set(self._history.skipped)
        in_a_row = next(n for n in count() if step - n not in skipped)
        if in_a_row < self._bound:
            return "skipped", ""
        return "stopped", f"; the {in_a_row} steps before it were skipped already"

    def _write(self) -> None:
        if current().is_main:
            write_json(self.path, self._history.to_dict())


def bad_turn(turns: Sequence[Turn], figures: Mapping[str, float]) -> Turn | None:
    """The first turn whose objective or gradient's norm is not finite; other figures may be."""
    for turn in turns:
        if not all(math.isfinite(figures[f"{prefix}{turn.name}"]) for prefix in GUARDED):
            return turn
    return None
