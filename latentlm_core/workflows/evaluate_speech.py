"""``latentlm eval wer | sim | drift`` of speech: samples => figures.

Each figure has its report ``evaluation/NAME.json`` beside what was measured, every single score a
row of ``evaluation/NAME.jsonl`` with its file, and WER a page to listen to. Several processes take
the recordings in turn; the main one writes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from latentlm_core.errors import DataError
from latentlm_core.evaluation.recognition import load_recogniser, normaliser
from latentlm_core.evaluation.speakers import load_speaker_encoder
from latentlm_core.evaluation.speech import speaker_similarity, word_errors
from latentlm_core.evaluation.speech_drift import measure_drift
from latentlm_core.evaluation.spoken_items import SpokenItem, read_spoken_items, write_scores
from latentlm_core.files import read_json, write_json
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.workflows.listening import listening_page
from latentlm_core.workflows.reports import EVALUATION, report_file
from latentlm_core.workflows.workspace import find_samples

Side = Literal["samples", "originals", "voices"]
"""What of a folder of samples is judged: the samples, or the recordings beside them."""


@joined(PATIENCE)
def evaluate_wer(
    *,
    samples: str | None = None,
    side: Side = "samples",
    recogniser: str = "faster-whisper",
    normalise: str = "basic",
    num_samples: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Let a recogniser write samples of speech down, and count its errors.

    Args:
        samples: a folder that ``speak`` made, or a .jsonl with ``file`` and ``text``; by default
            the newest samples.
        side: ``originals`` measures the recordings of the same texts that lie beside them,
            ``voices`` those that gave the voices, by their own texts.
        recogniser: as ``load_recogniser`` takes it.
        normalise: as ``normaliser`` takes it.
        num_samples: only the first so many.
        out: file of the report; by default beside the samples.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    path, items = _items(samples, side, num_samples, progress)
    name = _named("wer", side)
    where = report_file(out, _folder(path) / EVALUATION / f"{name}.json")
    with current().main_first():
        listener = load_recogniser(recogniser, resolve_device(device))
    report = word_errors(items, listener, normaliser(normalise), progress=progress)
    page = current().once(lambda: listening_page(report, where.with_suffix("")))
    return _reported(name, path, report.to_dict(), report.values, report.rows, where, page)


@joined(PATIENCE)
def evaluate_sim(
    *,
    samples: str | None = None,
    encoder: str = "resemblyzer",
    num_samples: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Compare the voices of samples with their prompts and with recordings of the same text.

    Args:
        samples: as in ``evaluate_wer``.
        encoder: as ``load_speaker_encoder`` takes it.
        num_samples: only the first so many.
        out: file of the report; by default beside the samples.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    path, items = _items(samples, "samples", num_samples, progress)
    where = report_file(out, _folder(path) / EVALUATION / "sim.json")
    with current().main_first():
        voices = load_speaker_encoder(encoder, resolve_device(device))
    report = speaker_similarity(items, voices, progress=progress)
    if _settings(path).get("protocol") == "3s-prefix":
        progress.warn(
            "These samples begin with their own prompts, which raises sim_prompt; sim_original is "
            "the one to compare."
        )
    return _reported("sim", path, report.to_dict(), report.values, report.rows, where)


@joined(PATIENCE)
def evaluate_drift(
    *,
    samples: str | None = None,
    recogniser: str = "faster-whisper",
    normalise: str = "basic",
    encoder: str = "resemblyzer",
    window_seconds: float = 10.0,
    num_samples: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """WER by fifth of the text, and SIM to the prompt by seconds from the beginning.

    Args:
        samples: as in ``evaluate_wer``, with the next two.
        recogniser: as ``load_recogniser`` takes it.
        normalise: as ``normaliser`` takes it.
        encoder: as ``load_speaker_encoder`` takes it.
        window_seconds: of voice that is compared at a time.
        num_samples: only the first so many.
        out: file of the report; by default beside the samples.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    path, items = _items(samples, "samples", num_samples, progress)
    target = report_file(out, _folder(path) / EVALUATION / "drift.json")
    where = resolve_device(device)
    with current().main_first():
        listener, voices = load_recogniser(recogniser, where), load_speaker_encoder(encoder, where)
    understood = word_errors(items, listener, normaliser(normalise), progress=progress)
    report = measure_drift(
        items, understood, voices, window_seconds=window_seconds, progress=progress
    )
    figures: dict[str, Any] = {
        f"wer_part_{part.part + 1}": part.wer for part in report.wer_parts
    } | {f"sim_from_{place.start_seconds:g}s": place.sim_prompt for place in report.sim_positions}
    return _reported("drift", path, report.to_dict(), figures, report.rows, target)


def _items(
    samples: str | None, side: Side, count: int | None, progress: Progress
) -> tuple[Path, list[SpokenItem]]:
    path = find_samples(samples, progress)
    items = read_spoken_items(path)[:count]
    if side == "samples":
        return path, items
    swapped = [
        (item, item.original, item.text)
        if side == "originals"
        else (item, item.prompt, item.prompt_text)
        for item in items
    ]
    found = [replace(item, file=file, text=text) for item, file, text in swapped if file and text]
    if not found:
        raise DataError(f"{path} has no {side} with texts beside its samples.")
    return path, found


def _named(metric: str, side: Side) -> str:
    return metric if side == "samples" else f"{metric}-{side}"


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _settings(path: Path) -> dict[str, Any]:
    """What ``latentlm sample`` says of its samples; nothing of speech from elsewhere."""
    file = _folder(path) / "settings.json"
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _reported(
    name: str,
    path: Path,
    details: dict[str, Any],
    figures: dict[str, Any],
    rows: Sequence[Any],
    where: Path,
    page: Path | None = None,
) -> Result:
    settings = _settings(path)
    model = settings.get("model_sha256")
    whole = {"model_sha256": model, **details, "samples_settings": settings or None}
    current().once(lambda: write_json(where, finite(whole)))
    current().once(lambda: write_scores(where.with_suffix(".jsonl"), rows))
    files = {"report": str(where), "scores": str(where.with_suffix(".jsonl"))}
    if page is not None:
        files["page"] = str(page)
    return Result(name, figures, files, whole)
