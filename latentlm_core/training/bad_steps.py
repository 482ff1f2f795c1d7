"""What a run remembers of its bad steps, as ``bad-numbers.json`` in its folder.

The reports are for people; ``skipped`` and ``roll_backs`` decide how a run goes on that is taken up
again: how many steps in a row were skipped, and which batches were left out.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from latentlm_core.config import Config, build
from latentlm_core.errors import ConfigError, CorruptFileError
from latentlm_core.files import read_json
from latentlm_core.training.culprit import Cause

Action = Literal["stopped", "skipped", "rolled back"]

FILE_NAME = "bad-numbers.json"
"""In the run's folder."""
DAMAGE: tuple[Cause, ...] = ("weights", "optimizer")
"""Causes that lie before the step."""
MAX_REPORTS = 100
"""Reports that are kept, the newest."""
MAX_KEYS = 100
"""Examples that a report names."""
SHOWN_KEYS = 8
"""Examples that a message names."""


class BadStep(Config):
    """The report of a bad step."""

    step: int
    """Its number, as in metrics.jsonl."""
    action: Action
    """What was done about it."""
    turn: str
    """Whose loss or gradient is not finite."""
    cause: Cause
    """What was not finite first: `weights` or `optimizer` (before the step), `data`, `forward` (the
    output of a module), `loss` (a term), `gradient` (of a module), `gradient norm` (it overflows),
    or `unknown`: run again, everything was finite."""
    name: str | None
    """Of that module, term, field, weight; null where there is none to name."""
    timesteps: tuple[str, ...]
    """Bands of timesteps where numbers are not finite."""
    keys: tuple[str, ...]
    """Examples where numbers are not finite; empty where they cannot be told."""
    examples: tuple[str, ...]
    """Examples of the step."""
    num_examples: int
    """How many there are."""
    figures: dict[str, str]
    """The step's figures."""
    place: int
    """Steps' worth of batches that lie before its own in the data."""
    noticed: int
    """The step that the run had come to: this one, or a later one where a GPU's host had gone on.
    Only where steps are skipped may the weights have changed by then."""


class RolledBack(Config):
    """A return to a checkpoint."""

    step: int
    """The bad step."""
    to: int
    """The step of the checkpoint; `step - to` steps' batches are left out."""


class History(Config):
    """What a run remembers of its bad steps."""

    format: Literal["latentlm-bad-numbers"] = "latentlm-bad-numbers"
    """What the file is."""
    format_version: Literal[1] = 1
    """Version of its layout."""
    skipped: tuple[int, ...] = ()
    """Steps that changed nothing."""
    roll_backs: tuple[RolledBack, ...] = ()
    """Returns to checkpoints."""
    reports: tuple[BadStep, ...] = Field(default=(), max_length=MAX_REPORTS)
    """The newest bad steps."""

    def until(self, step: int) -> "History":
        """The history of a run that stands at ``step``; reports of what is ahead stay."""
        return self.model_copy(
            update={
                "skipped": tuple(bad for bad in self.skipped if bad <= step),
                "roll_backs": tuple(back for back in self.roll_backs if back.to <= step),
            }
        )

    def with_report(self, report: BadStep, to: int | None) -> "History":
        """With one more bad step, which takes the place of an earlier report of the same one.

        Args:
            report: of the step.
            to: the step of the checkpoint, where it was rolled back.
        """
        same = (report.step, report.place)
        others = [old for old in self.reports if (old.step, old.place) != same]
        update: dict[str, object] = {"reports": (*others, report)[-MAX_REPORTS:]}
        if report.action == "skipped":
            update["skipped"] = (*self.skipped, report.step)
        if to is not None:
            update["roll_backs"] = (*self.roll_backs, RolledBack(step=report.step, to=to))
        return self.model_copy(update=update)


def read_history(path: Path) -> History | None:
    """The history in a file; None where there is none."""
    if not path.exists():
        return None
    try:
        return build(History, read_json(path), str(path))
    except ConfigError as error:
        raise CorruptFileError(
            f"{path} is damaged: {str(error).removeprefix(f'{path}: ')}",
            hint="It says which batches were left out. Without it the run finds out anew.",
        ) from None


def describe(report: BadStep) -> str:
    """The report as the beginning of a sentence."""
    values = ", ".join(f"{name} = {value}" for name, value in report.figures.items())
    where = f", at timesteps {' and '.join(report.timesteps)}" if report.timesteps else ""
    if report.keys:
        where += f", in {_some(report.keys, len(report.keys))}"
    elif report.examples:
        where += f", in some of {_some(report.examples, report.num_examples)}"
    what = _what(report.cause, report.name)
    return f"Step {report.step} is not finite and was not applied ({values}): {what}{where}"


def _what(cause: Cause, name: str | None) -> str:
    return {
        "weights": f"the weights {name} were not finite before it",
        "optimizer": f"the optimizer's {name} was not finite before it",
        "data": f"{name} of its data is not finite",
        "forward": f"the first output that is not finite is that of {name}",
        "loss": f"the loss {name} is not finite although the outputs of the modules are",
        "gradient": f"the first gradient that is not finite is that of {name or 'the loss'}",
        "gradient norm": f"the norm of its gradient overflows, which is largest at {name}",
        "unknown": "run again it was finite",
    }[cause]


def _some(keys: tuple[str, ...], total: int) -> str:
    rest = total - len(keys[:SHOWN_KEYS])
    return ", ".join(keys[:SHOWN_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def way_out(report: BadStep) -> str:
    """What to do about a bad step that ended the run."""
    if report.cause in DAMAGE:
        return (
            "Run it again to go on from the last checkpoint; if that is damaged too, remove it to "
            "go on from the one before."
        )
    mend = "mend the data" if report.cause == "data" else "lower the learning rate or use float32"
    return (
        f"The last checkpoint is from before; {mend}, or go on without these batches: --set "
        "trainer.on_bad_numbers=skip (or rollback)."
    )
