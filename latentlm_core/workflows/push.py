"""``latentlm push``: an export => the hub, with a model card that says how it was measured."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from latentlm_core.artifacts import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    copy_export,
    export_kind,
)
from latentlm_core.files import read_json, sha256_file, write_text
from latentlm_core.hub import model_card, upload
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.workflows.workspace import find_export, workspace


def push(
    *, repo_id: str, model: str | None = None, private: bool = False, progress: Progress = SILENT
) -> Result:
    """Publish a generator or a sigma-VAE.

    Args:
        repo_id: ``ORG/NAME``.
        model: run or export; by default the newest generator.
        private: whether a repository that is made now is private.
        progress: listener.

    Returns:
        the address.

    Raises:
        ArtifactError: there is no such export, or the hub refused.
    """
    export = find_export(model, "generator", progress)
    reports = _reports(export)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        copy_export(export, folder)
        if (export / TOKENIZER_FOLDER).is_dir():
            shutil.copytree(export / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER)
        card = model_card(read_json(export / CONFIG_FILE), reports, repo_id)
        write_text(folder / "README.md", card)
        address = upload(folder, repo_id, private)
    figures = {"address": address, "kind": export_kind(export), "reports": len(reports)}
    return Result("Published", figures)


def _reports(export: Path) -> list[dict[str, Any]]:
    """What was measured of exactly these weights."""
    sha256 = sha256_file(export / WEIGHTS_FILE)
    folders = [export.parent]
    for settings in sorted((workspace() / "samples").glob("*/settings.json")):
        if read_json(settings).get("model_sha256") == sha256:
            folders.append(settings.parent)
    return [
        read_json(path) for folder in folders for path in sorted(folder.glob("evaluation/*.json"))
    ]
