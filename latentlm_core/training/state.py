"""Everything that a checkpoint holds and a run goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from latentlm_core.training.checkpoint import Checkpoint, CheckpointStore
from latentlm_core.training.checkpoint_files import copy_strictly
from latentlm_core.training.checkpoint_state import CheckpointState
from latentlm_core.training.optim import Ema
from latentlm_core.training.runlog import Means
from latentlm_core.training.step import Stepper


@dataclass(slots=True)
class TrainState:
    """The state of a run between two steps.

    Attributes:
        modules: the task's, by their names in checkpoints.
        stepper: holder of the optimizers.
        ema: average of the exported module.
        means: sums of the log interval that is under way.
        step: optimizer updates done.
        samples_seen: examples trained on.
        seconds: time spent training, over all sessions of the run.
    """

    modules: Mapping[str, nn.Module]
    stepper: Stepper
    ema: Ema
    means: Means
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0

    def save(
        self, store: CheckpointStore, config: dict[str, Any], score: float | None = None
    ) -> None:
        """Write a checkpoint of this state.

        Args:
            store: where to.
            config: of the run.
            score: objective on the held-out data after this step; None where it is not known.

        Raises:
            ArtifactError: it cannot be written.
        """
        plain = CheckpointState(
            step=self.step,
            samples_seen=self.samples_seen,
            seconds=self.seconds,
            config=config,
            score=score,
        )
        parts = {
            "model": self._weights(),
            "ema": self.ema.tensors(),
            "optimizer": self.stepper.tensors(),
            "figures": self.means.tensors(),
        }
        store.save(plain, parts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what ``save`` wrote.

        Raises:
            ArtifactError: the checkpoint is of other networks, naming every difference.
        """
        with checkpoint.open("model") as stored:
            copy_strictly(self._weights(), stored, str(checkpoint.path("model")))
        with checkpoint.open("ema") as stored:
            copy_strictly(self.ema.tensors(), stored, str(checkpoint.path("ema")))
        with checkpoint.open("optimizer") as stored:
            self.stepper.load(stored, str(checkpoint.path("optimizer")))
        self.means.load(checkpoint.read("figures"))
        self.step = checkpoint.state.step
        self.samples_seen = checkpoint.state.samples_seen
        self.seconds = checkpoint.state.seconds

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }
