"""``latentlm push``: an export => the hub, with a model card that says how it was measured."""

import tempfile
from pathlib import Path

from latentlm_core.artifacts import copy_export
from latentlm_core.errors import ArtifactError
from latentlm_core.export_config import export_kind
from latentlm_core.files import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    read_sealed_json,
    sha256_file,
    write_sealed_json,
    write_text,
)
from latentlm_core.hub import model_card, public, repository_name, upload
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.workflows.reports import reports_of
from latentlm_core.workflows.workspace import find_export


def push(
    *, repo_id: str, model: str | None = None, private: bool = False, progress: Progress = SILENT
) -> Result:
    """Publish a generator or a sigma-VAE, without paths of this machine.

    Args:
        repo_id: ``ORG/NAME``.
        model: run or export; by default the newest generator.
        private: whether a repository that is made now is private.
        progress: listener.

    Returns:
        the address.

    Raises:
        ArtifactError: there is no such export, it lacks a file, or the hub refused.
    """
    repository_name(repo_id)
    export = find_export(model, "generator", progress)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        _copy(export, folder)
        if export_kind(export) == "generator":
            _copy(export / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER)
        reports = reports_of(export, sha256_file(folder / WEIGHTS_FILE), progress)
        card = model_card(read_sealed_json(folder / CONFIG_FILE), reports, repo_id)
        write_text(folder / "README.md", card)
        address = upload(folder, repo_id, private)
    figures = {"address": address, "kind": export_kind(export), "reports": len(reports)}
    return Result("Published", figures)


def _copy(export: Path, target: Path) -> None:
    """An export as it may be read by all: its provenance names no path of this machine."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (export / name).is_file():
            raise ArtifactError(f"{export} cannot be published: it has no {name}.")
    copy_export(export, target)
    config = read_sealed_json(export / CONFIG_FILE)
    published = config | {"provenance": public(config.get("provenance", {}))}
    write_sealed_json(target / CONFIG_FILE, published)
