"""``latentlm doctor``: a machine, a data set, a latent set, a run or an export => what ails it.

Nothing is written and nothing is repaired. What a name stands for: a data set that is known by
that name, else what the folder of that name holds, in the working folder or the workspace.

    doctor_machine    Python, torch, extras, disk
    doctor_data       data sets of images, recordings and texts
    doctor_latents    latent sets
    doctor_run        runs, with doctor_log for their metrics.jsonl
    doctor_export     exports
"""

from pathlib import Path

from latentlm_core.data.manifest import MANIFEST
from latentlm_core.data.mixture import TEXT, is_mix, parse_mix
from latentlm_core.data.partial import PROGRESS
from latentlm_core.data.remote import is_url
from latentlm_core.data.streamed_tables import STREAM
from latentlm_core.errors import ArtifactError, CorruptFileError, did_you_mean
from latentlm_core.export_config import export_kind
from latentlm_core.files import CONFIG_FILE, WEIGHTS_FILE, read_json
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.workflows.doctor_data import KINDS, check_data
from latentlm_core.workflows.doctor_export import check_export
from latentlm_core.workflows.doctor_latents import check_latents
from latentlm_core.workflows.doctor_machine import check_machine
from latentlm_core.workflows.doctor_run import check_run
from latentlm_core.workflows.findings import Finding, within
from latentlm_core.workflows.workspace import EXPORT, find_place, workspace

PREFIXES = (*(name for kind in KINDS for name in kind.names), "folder", "hf", "stream")
"""What the name of a data set begins with."""
PLACES = ("runs", "latents")
"""Folders of the workspace in which a name is looked up."""


def doctor(*, target: str | None = None, progress: Progress = SILENT) -> Result:
    """Examine this machine, or something on it.

    Args:
        target: a data set as ``--data`` takes it (a mix is examined part by part), a latent set, a
            run or an export: a folder, or a name under ``runs`` or ``latents`` of the workspace.
            This machine where it is None.
        progress: listener.

    Returns:
        a line for each thing that was looked at. ``details["findings"]`` has them as ``what``,
        ``state`` and ``message``; ``details["faults"]`` and ``details["warnings"]`` count them.

    Raises:
        ArtifactError: nothing is called ``target``.
    """
    if target is None:
        return _result("Machine", check_machine())
    if is_url(target) and not target.startswith(STREAM):
        raise ArtifactError(
            f"{target} is a URL, and doctor examines what is on this machine.",
            hint=f"Of a latent set, train-lm checks each shard as it comes. Data: stream:{target}",
        )
    folder = _find(target)
    if folder is None and is_mix(target):
        return _result(f"Mix {target}", _check_mix(target, progress))
    return _result(*_examine(target, folder, progress))


def _examine(target: str, folder: Path | None, progress: Progress) -> tuple[str, list[Finding]]:
    """What a thing is called, and what was found."""
    if folder is None:
        return f"Data set {target}", check_data(target)
    if _is_latents(folder):
        return f"Latent set {folder}", check_latents(folder, progress)
    if (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir():
        return f"Run {folder}", check_run(folder)
    for candidate in (folder / EXPORT, folder):
        if _is_export(candidate):
            return f"Export {candidate}", check_export(candidate)
    return f"Data set {folder}", check_data(str(folder))


def _check_mix(target: str, progress: Progress) -> list[Finding]:
    findings = []
    for part in parse_mix(target):
        source = f"{TEXT}{part.source}" if part.kind == "text" else part.source
        findings += within(f"{part.kind} {part.source}", _examine_part(source, progress))
    return findings


def _examine_part(source: str, progress: Progress) -> list[Finding]:
    folder = _find(source)
    return _examine(source, folder, progress)[1]


def _find(target: str) -> Path | None:
    """The folder or file that is meant; None of what only its name tells.

    Raises:
        ArtifactError: there is nothing of that name.
    """
    if target.partition(":")[0] in PREFIXES:
        return None
    place = find_place(target, *PLACES)
    if place is not None or is_mix(target):
        return place
    known = [path.name for kind in PLACES for path in (workspace() / kind).glob("[!.]*")]
    raise ArtifactError(
        f"There is no run, latent set, data set or export {target}. "
        f"{did_you_mean(target, [*PREFIXES, *known])}"
    )


def _is_latents(folder: Path) -> bool:
    if (folder / PROGRESS / "plan.json").is_file() or any(folder.glob("shard-*.safetensors")):
        return True
    try:
        manifest = read_json(folder / MANIFEST)
    except (ArtifactError, CorruptFileError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == "latentlm-latents"


def _is_export(folder: Path) -> bool:
    has_both = all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
    return has_both or export_kind(folder) is not None


def _result(title: str, findings: list[Finding]) -> Result:
    states = [finding.state for finding in findings]
    faults, warnings = states.count("fault"), states.count("warning")
    figures = {finding.what: f"{finding.state:<9}{finding.message}" for finding in findings}
    details = {
        "findings": [
            {"what": finding.what, "state": finding.state, "message": finding.message}
            for finding in findings
        ],
        "faults": faults,
        "warnings": warnings,
    }
    counts = f"{_number(faults, 'fault')}, {_number(warnings, 'warning')}"
    return Result(f"{title}: {counts}", figures, {}, details)


def _number(count: int, name: str) -> str:
    return f"{count or 'no'} {name}{'' if count == 1 else 's'}"
