"""Where the reports of an export lie, and which of them are of exactly its weights.

    RUN/evaluation/                  of an export that is in its run
    WORKSPACE/evaluation/NAME/       of any other: a hub's, a bare one
    WORKSPACE/samples/NAME/evaluation/    of samples

Each report holds the sha256 of the weights that it measured, so one that was made before a run
went on is not taken for one of what the run has become.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError
from latentlm_core.files import read_json
from latentlm_core.hub import is_report
from latentlm_core.progress import Progress
from latentlm_core.workflows.workspace import EXPORT, slug, workspace

EVALUATION = "evaluation"


def report_folder(export: Path, spec: str | None) -> Path:
    """Where the reports of an export are written.

    Args:
        export: its folder.
        spec: how the user named it; a hub's cache would say nothing.
    """
    if _run(export):
        return export.parent / EVALUATION
    name = (spec or str(export.resolve())).rstrip("/").removesuffix(f"/{EXPORT}")
    return workspace() / EVALUATION / slug(name)


def report_name(metric: str, data: str, split: str, num_samples: int | None) -> str:
    """A name of its own for what was read: ``ppl-pydoc.json``, ``ppl-pydoc-train-200.json``."""
    part = [] if split == "test" else [split]
    count = [] if num_samples is None else [str(num_samples)]
    return f"{'-'.join([metric, slug(data), *part, *count])}.json"


def report_file(out: Path | None, otherwise: Path) -> Path:
    """Where a report goes; its scores and its page lie beside it under the same stem."""
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"The report {out} must be a .json file.", hint=f"Say --out {out}.json")
    return out or otherwise


def reports_of(export: Path, sha256: str, progress: Progress) -> list[dict[str, Any]]:
    """The reports that were measured of the weights with this sha256.

    What is no report is left out and told to ``progress``.
    """
    found = []
    for path in _candidates(export):
        try:
            report = read_json(path)
        except (ArtifactError, CorruptFileError) as error:
            progress.warn(f"Left out: {error}")
            continue
        if not is_report(report):
            progress.warn(f"Left out: {path} is no report of latentlm eval.")
        elif sha256 in (report.get("model_sha256"), report.get("vae_sha256")):
            found.append(report)
    return found


def _candidates(export: Path) -> Iterator[Path]:
    if _run(export):
        yield from sorted((export.parent / EVALUATION).glob("*.json"))
    yield from sorted((workspace() / EVALUATION).glob("*/*.json"))
    yield from sorted((workspace() / "samples").glob(f"*/{EVALUATION}/*.json"))


def _run(export: Path) -> bool:
    return export.name == EXPORT and (export.parent / "metrics.jsonl").is_file()
