"""``latentlm doctor`` of a ``metrics.jsonl``: its rows, its values, what they say of the run.

Notable choices:
- a step that is there twice is a fault, for a run that resumes drops such rows; one that is missing
  is a warning, since ``log_every`` may have changed when the run was resumed;
- a figure that is not finite is null in our logs, as is one that counted nothing: null is a warning
  where other rows have a number, NaN is a fault, since something else wrote it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from latentlm_core.errors import LatentLMError
from latentlm_core.training.runlog import read_metrics
from latentlm_core.workflows.doctor_noise import check_noise
from latentlm_core.workflows.findings import Finding, fault, listed, ok, unread, warning

Row = Mapping[str, Any]

MAX_GROWTH = 1.5
"""Factor by which std(mu) may grow over the second half of a run; settled ones stay below 1.2."""
NO_LEARNING = 1.0
"""Loss of a prediction that is zero throughout: targets have unit variance."""
_BAND = re.compile(r"validation/latent/t(\d+-\d+)")


def check_log(
    path: Path, step: int | None, log_every: int | None, posterior: str | None
) -> list[Finding]:
    """Examine the log of a run.

    Args:
        path: the file.
        step: of the newest checkpoint, None where there is none.
        log_every: steps between rows, None where it is not known.
        posterior: kind of the posterior of a sigma-VAE, where it is known.
    """
    try:
        rows = read_metrics(path)
    except LatentLMError as error:
        return [unread("log", error)]
    if not rows:
        return [warning("log", "it has no row yet; the first comes after trainer.log_every steps.")]
    return [
        _check_steps([row["step"] for row in rows], step, log_every),
        _check_values(rows),
        *_check_noise(rows, posterior),
        *_check_bands(rows),
    ]


def _check_steps(steps: Sequence[int], at: int | None, log_every: int | None) -> Finding:
    twice = [step for step, count in Counter(steps).items() if count > 1]
    back = [later for earlier, later in pairwise(steps) if later < earlier]
    if twice or back:
        shown = f"twice: {listed(twice)}" if twice else f"out of order: {listed(back)}"
        return fault(
            "log steps", f"{shown}. Two processes wrote it, or it was edited; remove those rows."
        )
    missing = [] if log_every is None else _gaps(steps, at, log_every)
    if missing:
        return warning(
            "log steps",
            f"rows are missing after {listed(missing)} (trainer.log_every is {log_every}). "
            "Figures in between are lost, weights are not.",
        )
    return ok("log steps", f"{len(steps):,} rows to step {steps[-1]:,}, none twice or missing")


def _gaps(steps: Sequence[int], at: int | None, log_every: int) -> list[int]:
    """Steps after which a row should have come, judged against the spacing of their neighbours."""
    places = [0, *steps]
    spacing = [later - earlier for earlier, later in pairwise(places)]
    neighbours = [spacing[1] if len(spacing) > 1 else log_every, *spacing]
    found = [
        place
        for place, gap, neighbour in zip(places, spacing, neighbours, strict=False)
        if gap > max(log_every, neighbour)
    ]
    if at is not None and at // log_every * log_every > steps[-1]:
        found.append(steps[-1])
    return found


def _check_values(rows: Sequence[Row]) -> Finding:
    wild = [
        f"{name} at step {row['step']}"
        for row in rows
        for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if wild:
        return fault(
            "log values",
            f"not finite: {listed(wild)}. Go back to a checkpoint from before, with a lower "
            "learning rate or in float32.",
        )
    counted = {name for row in rows for name, value in row.items() if value is not None}
    null = [
        f"{name} at step {row['step']}"
        for row in rows
        for name, value in row.items()
        if value is None and name in counted
    ]
    if null:
        return warning(
            "log values",
            f"null, which is not finite or nothing to count: {listed(null)}. "
            "Look at the losses there.",
        )
    return ok("log values", "all are finite")


def _check_noise(rows: Sequence[Row], posterior: str | None) -> list[Finding]:
    """The noise of a sigma-VAE, and how std(mu) grew over the second half of the run."""
    ratios = [value for _, value in _series(rows, "noise_to_signal")]
    if not ratios:
        return []
    findings = check_noise(posterior, ratios[-1])
    spread = _series(rows, "std_mean")
    half = [value for step, value in spread if 2 * step >= rows[-1]["step"]]
    if not findings or len(half) < 2 or half[0] <= 0:
        return findings
    growth = half[-1] / half[0]
    told = f"std(mu) {half[0]:.3g} => {half[-1]:.3g} over the second half of the run"
    if growth <= MAX_GROWTH:
        return [*findings, ok("std(mu)", told)]
    return [*findings, warning("std(mu)", f"{told}: it still grows. Watch it, or raise loss.beta.")]


def _check_bands(rows: Sequence[Row]) -> list[Finding]:
    """The last validation loss by band of timesteps."""
    bands: dict[str, float] = {}
    for row in rows:
        found = {m[1]: row[name] for name in row if (m := _BAND.fullmatch(name))}
        bands = {band: loss for band, loss in found.items() if _is_number(loss)} or bands
    if not bands:
        return []
    told = ", ".join(f"t{band} {loss:.3f}" for band, loss in bands.items())
    idle = [f"t{band}" for band, loss in bands.items() if loss >= NO_LEARNING]
    if idle:
        return [
            warning(
                "loss by timestep",
                f"{told}. In {listed(idle)} it is no better than predicting zero: train longer.",
            )
        ]
    return [ok("loss by timestep", told)]


def _series(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure, where it is a finite number."""
    return [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf
