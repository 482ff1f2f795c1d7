"""``latentlm doctor`` of a run: where it stands, its checkpoint, average, log and export."""

import math
from pathlib import Path
from typing import Any

from latentlm_core.errors import ArtifactError, CorruptFileError, LatentLMError
from latentlm_core.export_config import export_kind
from latentlm_core.training.checkpoint import Checkpoint, CheckpointStore
from latentlm_core.training.optim import ema_decay
from latentlm_core.workflows.doctor_export import Weights, check_export, read_export
from latentlm_core.workflows.doctor_locks import check_lock, is_locked
from latentlm_core.workflows.doctor_log import check_log
from latentlm_core.workflows.findings import Finding, fault, listed, ok, unread, warning, within
from latentlm_core.workflows.workspace import EXPORT

MAX_INITIAL_SHARE = 0.01
"""Share of the initial weights in an average that is old enough."""


def check_run(folder: Path) -> list[Finding]:
    """Examine a run; every byte of its newest checkpoint and of its export is read."""
    findings = [check_lock(folder, "training")]
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = CheckpointStore(folder / "checkpoints", keep=1).latest()
    except (ArtifactError, CorruptFileError) as error:
        findings.append(unread("checkpoint", error))
    else:
        findings += _check_checkpoint(checkpoint)
    findings.append(_check_stand(folder, checkpoint))
    config = {} if checkpoint is None else checkpoint.state.config
    if checkpoint is not None:
        decay = _get(config, "trainer", "ema_decay")
        findings.append(_check_average(checkpoint.state.step, decay))
    findings += check_log(
        folder / "metrics.jsonl",
        None if checkpoint is None else checkpoint.state.step,
        _get(config, "trainer", "log_every"),
        _get(config, "recipe", "tokenizer", "posterior", "kind"),
    )
    if (folder / EXPORT).is_dir():
        findings += within(EXPORT, check_export(folder / EXPORT))
    return findings


def _check_checkpoint(checkpoint: Checkpoint | None) -> list[Finding]:
    """Whether the tensors of a verified checkpoint are numbers."""
    if checkpoint is None:
        return []
    told = f"{checkpoint.folder.name}: {len(checkpoint.state.files)} files have their checksums"
    wild = []
    for name in sorted(checkpoint.state.files):
        try:
            weights = Weights.read(checkpoint.folder / name)
        except LatentLMError as error:
            return [unread("checkpoint", error)]
        wild += [f"{tensor} of {name}" for tensor in weights.not_finite]
    if wild:
        return [
            fault(
                "checkpoint",
                f"{checkpoint.folder} has values that are not finite in {listed(wild)}. Remove it "
                "to go on from the one before it, with a lower learning rate.",
            )
        ]
    return [ok("checkpoint", f"{told} and finite values")]


def _check_stand(folder: Path, checkpoint: Checkpoint | None) -> Finding:
    """Whether a run is finished, or where it stands."""
    what, again = "progress", "Run the same command again to go on."
    busy = is_locked(folder)
    if checkpoint is None:
        told = "no sound checkpoint yet"
        return ok(what, f"{told}, at work") if busy else warning(what, f"{told}. {again}")
    step, total = checkpoint.state.step, _get(checkpoint.state.config, "trainer", "total_steps")
    told = f"step {step:,} of {total:,}" if isinstance(total, int) else f"step {step:,}"
    if step != total:
        return ok(what, f"{told}, at work") if busy else warning(what, f"{told}. {again}")
    if export_kind(folder / EXPORT) is None:
        if busy:
            return ok(what, f"{told}, at work")
        return warning(what, f"{told}, without an export. Run the same command again for it.")
    exported = _exported_step(folder / EXPORT)
    if exported is not None and exported != step:
        return warning(what, f"{told}, and the export is of step {exported:,}. {again}")
    return ok(what, f"finished: {told}")


def _exported_step(export: Path) -> int | None:
    try:
        step = read_export(export).provenance.get("step")
    except LatentLMError:
        return None
    return step if isinstance(step, int) else None


def _check_average(step: int, limit: Any) -> Finding:
    """Whether the moving average has forgotten the initial weights."""
    what = "average"
    if not isinstance(limit, int | float) or not 0 <= limit < 1:
        return warning(what, "Not examined, for the checkpoint names no trainer.ema_decay.")
    if step < 1:
        return warning(what, "it is the initial weights, for nothing was trained yet.")
    initial, age = average_age(step, limit)
    decay = ema_decay(step - 1, limit)
    rising = "" if decay == limit else f", on its way to {limit:g}"
    told = f"decay {decay:.4g}{rising}; it is {age:,.1f} steps behind on average"
    if initial > MAX_INITIAL_SHARE:
        return warning(
            what, f"{told}, and {initial:.1%} of it the initial weights: too young. Train longer."
        )
    return ok(what, told)


def average_age(step: int, limit: float) -> tuple[float, float]:
    """What the moving average of ``training.optim.ema_decay`` holds after ``step`` updates.

    While the decay rises as (1 + t) / (10 + t), the initial weights have the share
    prod_{j=1..9} j / (step + j), and the mean age is a tenth of the steps; from then on the age a
    follows a => limit (a + 1).

    Returns:
        the share of the initial weights, and the mean age in steps of all that it averages.
    """
    rising = min(step, max(0, math.ceil((10 * limit - 1) / (1 - limit))))
    constant = limit ** (step - rising)
    initial = math.prod(j / (rising + j) for j in range(1, 10)) * constant
    settled = limit / (1 - limit)
    return initial, settled + (rising / 10 - settled) * constant


def _get(config: Any, *keys: str) -> Any:
    """A value deep in a configuration, None where it is not there."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
