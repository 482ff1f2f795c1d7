"""Exports on the Hugging Face hub: fetch one, publish one, and describe it.

Only JSON, safetensors and Markdown travel, in both directions, so nothing that is fetched can run
code and nothing that is published asks others to.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latentlm_core.errors import ArtifactError

PREFIX = "hf:"
ALLOWED_PATTERNS = (
    "config.json",
    "text.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "README.md",
    "tokenizer/config.json",
    "tokenizer/*.safetensors",
)
"""What is fetched of a repository: our exports, and published weights in shards."""

ALLOWED_SUFFIXES = (".json", ".safetensors", ".md")
"""What may be published."""

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REPOSITORY = re.compile(f"{_NAME}/{_NAME}")

_ROOT = r"(?:~?/|[A-Za-z]:[\\/](?!/)|\\\\)"
_PATH_SPEC = re.compile(rf"(?P<name>(?:(?!https?:)\w{{2,}}:)?)(?P<path>{_ROOT}.*)", re.DOTALL)
"""A path, or the name of a data set with one, as ``cifar10:/data/cifar10``."""
_PATH = re.compile(rf"(?P<url>https?://\S*)|(?P<path>(?<![\w./~\\]){_ROOT}[^\s\"'`,;)\]]+)")
"""A path inside a sentence; an address is none."""


def is_hub_id(text: str) -> bool:
    """Whether ``text`` names a repository: ``hf:ORG/NAME``, or ``ORG/NAME`` where no folder ORG is.

    So ``runs/digitz`` beside a folder ``runs`` is a misspelt run, not a question to the hub.
    """
    if text.startswith(PREFIX):
        return True
    return _REPOSITORY.fullmatch(text) is not None and not os.path.exists(Path(text).parent)


def download(
    repo_id: str, offline: bool = False, patterns: Sequence[str] = ALLOWED_PATTERNS
) -> Path:
    """Fetch a repository's export into the hub's cache, or find it there.

    Args:
        repo_id: ``ORG/NAME``, with or without ``hf:``.
        offline: use the cache alone (so does HF_HUB_OFFLINE=1).
        patterns: of the names of the files that are fetched.

    Returns:
        The local folder.

    Raises:
        ArtifactError: not a repository's name, no such repository, no access, no network, or no
            export in it.
    """
    from huggingface_hub import snapshot_download

    name = repository_name(repo_id)
    try:
        folder = snapshot_download(name, allow_patterns=list(patterns), local_files_only=offline)
    except Exception as error:  # the library and its transport share no base class
        raise _refusal(name, error) from error
    if not (Path(folder) / "config.json").is_file():
        raise ArtifactError(f"The hub repository {name} holds no export: it has no config.json.")
    return Path(folder)


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Publish an export; the repository is made if it is not there.

    Args:
        folder: an export: config.json, model.safetensors and, if written, README.md.
        repo_id: ``ORG/NAME``, with or without ``hf:``.
        private: whether a repository that is made now is private.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: the folder is no export or holds other kinds of files, or the hub refused.
    """
    from huggingface_hub import HfApi

    name = repository_name(repo_id)
    check_export(folder)
    api = HfApi(library_name="latentlm")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload an export of latentlm"
        )
    except Exception as error:  # the library and its transport share no base class
        raise _refusal(name, error) from error
    return str(address)


def check_export(folder: Path) -> None:
    """Hold a folder to what an export may contain.

    Raises:
        ArtifactError: a file is missing, or is of another kind than JSON, safetensors, Markdown.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is no export: it has no {name}.")
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    foreign = [str(path.relative_to(folder)) for path in files if not _may_travel(path)]
    if foreign:
        raise ArtifactError(
            f"{folder} holds files that an export must not have: {', '.join(foreign)}.",
            hint=f"Only {', '.join(ALLOWED_SUFFIXES)} files are published; remove the others.",
        )


def model_card(
    config: Mapping[str, Any],
    evaluation: Sequence[Mapping[str, Any]],
    repo_id: str = "ORG/NAME",
) -> str:
    """The README.md of a published export.

    Args:
        config: the export's config.json.
        evaluation: reports as ``latentlm eval`` writes them: ``values`` by name, or the ``best``
            point of a sweep and its ``metric``, with protocol and ``warnings``; others fail
            ``is_report``.
        repo_id: where it will stand, for the example.

    Returns:
        Markdown under a YAML front matter that the hub reads, without paths of this machine. It
        states no licence: that of the weights is their maker's to choose.
    """
    kind = _kind(config)
    reports = [_report_section(public(report)) for report in evaluation]
    parts = [
        _front_matter(kind, evaluation),
        f"# {repo_id.rpartition('/')[2]}",
        kind.text,
        f"## Use\n\n```sh\n{kind.command.format(repo_id)}\n```",
        "## Evaluation",
        *(reports or ["Nothing was measured before it was published."]),
        f"## Configuration\n\n{_folded_json(config)}",
    ]
    return "\n\n".join(parts) + "\n"


def is_report(value: Any) -> bool:
    """Whether a JSON value is a report that a card can show."""
    if not isinstance(value, dict):
        return False
    best = value.get("best")
    is_sweep = isinstance(best, dict) and "fid" in best and isinstance(value.get("metric"), str)
    return (
        (isinstance(value.get("values"), dict) or is_sweep)
        and isinstance(value.get("protocol", {}), dict)
        and isinstance(value.get("warnings", []), list)
    )


def public(value: Any) -> Any:
    """A JSON value with each absolute path, inside texts too, reduced to its last part."""
    if isinstance(value, Mapping):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    whole = _PATH_SPEC.fullmatch(value)
    if whole:
        return whole["name"] + _last_part(whole["path"])
    return _PATH.sub(lambda found: found["url"] or _last_part(found["path"]), value)


def repository_name(text: str) -> str:
    """``ORG/NAME`` out of ``ORG/NAME`` or ``hf:ORG/NAME``.

    Raises:
        ArtifactError: the text is neither.
    """
    name = text.removeprefix(PREFIX)
    if _REPOSITORY.fullmatch(name) is None:
        raise ArtifactError(f"{text} does not name a hub repository; such a name is ORG/NAME.")
    return name


class _Kind(NamedTuple):
    """What a card says of one kind of export."""

    tag: str
    text: str
    command: str


_PAPER = "LatentLM (arXiv:2412.08635)"
_OVER_LATENTS = (
    f"over the continuous latents of a sigma-VAE, as in {_PAPER}. The tokenizer is in the folder "
    "`tokenizer`."
)
_IMAGES = _Kind(
    "class-conditional-image-generation",
    f"A class-conditional generator of images {_OVER_LATENTS}",
    "latentlm sample --model {} --class 0 -n 16",
)
_SPEECH = _Kind(
    "text-to-speech",
    f"A text-to-speech model {_OVER_LATENTS}",
    'latentlm sample --model {} --text "three one four"',
)
_SPEECH_NETWORKS = ("causal-conv", "spectral")
_METRICS = (
    *("fid", "is", "kid", "precision", "recall", "rfid", "psnr", "ssim", "lpips"),
    *("wer", "wer_recordings", "wer_reconstructions", "sim_prompt", "sim_original"),
    *("mel_distance", "pesq_wb", "pesq_nb", "stoi"),
)
_STATED = (
    *("num_samples", "num_images", "num_recordings", "samples", "data", "split", "reference"),
    *("extractor", "recogniser", "normaliser", "encoder"),
)
"""What of a report's protocol stands above its figures."""


def _kind(config: Mapping[str, Any]) -> _Kind:
    if config.get("kind") != "sigma-vae":
        return _SPEECH if config.get("speech") else _IMAGES
    network = config.get("tokenizer", {}).get("network", {}).get("kind")
    media = "speech" if network in _SPEECH_NETWORKS else "images"
    return _Kind(
        "sigma-vae",
        f"The sigma-VAE of {_PAPER}: it turns {media} into short sequences of continuous latents "
        "and back.",
        "latentlm tokenize --vae {} --data FOLDER",
    )


def _front_matter(kind: _Kind, evaluation: Sequence[Mapping[str, Any]]) -> str:
    measured = {name for report in evaluation for name in _figures(report)}
    lines = ["---", "library_name: latentlm", "tags:", "- latentlm", f"- {kind.tag}"]
    metrics = [name for name in _METRICS if name in measured]
    lines += ["metrics:", *(f"- {name}" for name in metrics)] if metrics else []
    return "\n".join([*lines, "---"])


def _report_section(report: Mapping[str, Any]) -> str:
    figures = _figures(report)
    heading = ", ".join(name for name in figures if name.partition("[")[0] in _METRICS)
    protocol = {**report, **report.get("protocol", {})}
    stated = [f"{name} {_shown(protocol[name])}" for name in _STATED if protocol.get(name)]
    rows = [f"| {name} | {_shown(value)} |" for name, value in figures.items()]
    parts = [
        f"### {heading}",
        "; ".join(stated),
        "\n".join(["| figure | value |", "|---|---|", *rows]),
        "\n".join(f"- {warning}" for warning in report.get("warnings", ())),
        _folded_json(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _figures(report: Mapping[str, Any]) -> Mapping[str, Any]:
    if "values" in report:
        figures: Mapping[str, Any] = report["values"]
        return figures
    settings = {name: value for name, value in report["best"].items() if name != "fid"}
    return {report["metric"]: report["best"]["fid"], **settings}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _folded_json(value: Mapping[str, Any]) -> str:
    text = json.dumps(public(value), indent=2)
    return f"<details><summary>JSON</summary>\n\n```json\n{text}\n```\n\n</details>"


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _may_travel(path: Path) -> bool:
    return path.suffix in ALLOWED_SUFFIXES and path.is_file() and not path.is_symlink()


def _refusal(name: str, error: Exception) -> ArtifactError:
    """What the hub's library complained of, as a sentence with the way out."""
    from huggingface_hub import errors

    log_in = "Log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, errors.GatedRepoError):
        return ArtifactError(
            f"The hub repository {name} is gated.",
            hint=f"Ask for access at https://huggingface.co/{name}. {log_in}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ArtifactError(
            f"The hub has no repository {name}, or does not show it to you.",
            hint=f"Check the name; for a private repository: {log_in}",
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return ArtifactError(
            f"{name} is not in the hub's local cache, and the hub cannot be reached.",
            hint="Check the network and HF_HUB_OFFLINE, or name an export on this disk.",
        )
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return ArtifactError(f"The hub refuses access to {name}.", hint=log_in)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ArtifactError(f"The hub cannot be used for {name}: {reason}.")
