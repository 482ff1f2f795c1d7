"""``latentlm eval wer | sim | drift | recon`` of speech: samples or a sigma-VAE => figures.

Each figure has its report ``evaluation/NAME.json`` beside what was measured, every single score a
row of ``evaluation/NAME.jsonl`` with its file, and WER a page to listen to.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from latentlm_core.artifacts import LoadedTokenizer
from latentlm_core.data.audio import ClipLimits, check_clip, prepare, write_wav
from latentlm_core.data.base import SpeechSource
from latentlm_core.data.sources import Subset, spread
from latentlm_core.data.speech_sources import open_speech, open_speech_with_held_out
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.evaluation.recognition import load_recogniser, normaliser
from latentlm_core.evaluation.speakers import load_speaker_encoder
from latentlm_core.evaluation.speech import speaker_similarity, word_errors
from latentlm_core.evaluation.speech_drift import measure_drift
from latentlm_core.evaluation.speech_quality import (
    AudioPair,
    installed_metrics,
    reconstruction_quality,
)
from latentlm_core.evaluation.spoken_items import SpokenItem, read_spoken_items, write_scores
from latentlm_core.files import read_json, write_json, write_text
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.workflows.listening import listening_page
from latentlm_core.workflows.reports import EVALUATION, report_folder
from latentlm_core.workflows.vae_jobs import rebuild
from latentlm_core.workflows.workspace import find_samples

HELD_OUT = "the twentieth of train that train-vae holds out"
"""The split of a reconstruction report where the data has no test split."""

Side = Literal["samples", "originals", "voices"]
"""What of a folder of samples is judged: the samples, or the recordings beside them."""


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
    where = _report_file(out, _folder(path) / EVALUATION / f"{name}.json")
    listener = load_recogniser(recogniser, resolve_device(device))
    report = word_errors(items, listener, normaliser(normalise), progress=progress)
    page = listening_page(report, where.with_suffix(""))
    return _reported(name, path, report.to_dict(), report.values, report.rows, where, page)


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
    where = _report_file(out, _folder(path) / EVALUATION / "sim.json")
    voices = load_speaker_encoder(encoder, resolve_device(device))
    report = speaker_similarity(items, voices, progress=progress)
    if _settings(path).get("protocol") == "3s-prefix":
        progress.warn(
            "These samples begin with their own prompts, which raises sim_prompt; sim_original is "
            "the one to compare."
        )
    return _reported("sim", path, report.to_dict(), report.values, report.rows, where)


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
    target = _report_file(out, _folder(path) / EVALUATION / "drift.json")
    where = resolve_device(device)
    listener, voices = load_recogniser(recogniser, where), load_speaker_encoder(encoder, where)
    understood = word_errors(items, listener, normaliser(normalise), progress=progress)
    report = measure_drift(
        items, understood, voices, window_seconds=window_seconds, progress=progress
    )
    figures: dict[str, Any] = {
        f"wer_part_{part.part + 1}": part.wer for part in report.wer_parts
    } | {f"sim_from_{place.start_seconds:g}s": place.sim_prompt for place in report.sim_positions}
    return _reported("drift", path, report.to_dict(), figures, report.rows, target)


def reconstruct_speech(
    tokenizer: LoadedTokenizer,
    *,
    data: str,
    vae: str | None,
    split: str,
    num_samples: int | None,
    recogniser: str | None,
    normalise: str,
    encoder: str | None,
    out: Path | None,
    device: torch.device,
    progress: Progress,
) -> Result:
    """Measure a sigma-VAE's reconstructions of speech: mel distance, PESQ, STOI, WER and SIM.

    Recordings and reconstructions are left beside the report, as samples that ``evaluate_wer`` and
    ``evaluate_sim`` read too. Arguments as in ``workflows.evaluate_reconstruction``.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    target = _report_file(out, report_folder(tokenizer.folder, vae) / "recon.json")
    source, part = _open_split(data, split)
    listener = None if recogniser is None else load_recogniser(recogniser, device)
    voices = None if encoder is None else load_speaker_encoder(encoder, device)
    rule = normaliser(normalise)
    chosen = spread(source, num_samples)
    pairs = _rebuild(tokenizer.model, chosen, target.with_suffix(""), device, progress)
    rate = tokenizer.model.speech.sample_rate
    quality = reconstruction_quality(
        pairs, len(chosen), rate, installed_metrics(), progress=progress
    )
    warnings = list(quality.warnings)
    if part == "train":
        warnings.append(
            "The tokenizer may have been trained on these recordings: they are of train."
        )
        progress.warn(warnings[-1])
    values: dict[str, Any] = dict(quality.values)
    details = quality.to_dict()
    items = read_spoken_items(target.with_suffix(""))
    recordings = [replace(item, file=item.original) for item in items if item.original]
    if listener is not None:
        for name, side in (("recordings", recordings), ("reconstructions", items)):
            report = word_errors(side, listener, rule, progress=progress)
            values[f"wer_{name}"] = report.values["wer"]
            details[f"wer_{name}"] = report.to_dict()
            write_scores(target.with_suffix("") / f"wer-{name}.jsonl", report.rows)
    if voices is not None:
        similarity = speaker_similarity(items, voices, progress=progress)
        values["sim_original"] = similarity.values.get("sim_original")
        details["sim"] = similarity.to_dict()
    write_scores(target.with_suffix("") / "quality.jsonl", quality.rows)
    details |= {
        "split": part,
        "data": data,
        "vae": str(tokenizer.folder),
        "vae_sha256": tokenizer.sha256,
        "values": values,
        "warnings": warnings,
    }
    write_json(target, finite(details))
    figures = values | {"recordings": len(items), "split": part}
    files = {"report": str(target), "heard": str(target.with_suffix(""))}
    return Result("Reconstruction of speech", figures, files, details)


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


def _report_file(out: Path | None, otherwise: Path) -> Path:
    """Where a report goes; its scores and its page lie beside it under the same stem."""
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"The report {out} must be a .json file.", hint=f"Say --out {out}.json")
    return out or otherwise


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
    write_json(where, finite(whole))
    write_scores(where.with_suffix(".jsonl"), rows)
    files = {"report": str(where), "scores": str(where.with_suffix(".jsonl"))}
    if page is not None:
        files["page"] = str(page)
    return Result(name, figures, files, whole)


def name_of_held_out(train: object, held_out: object) -> str:
    """What a report calls the part that ``train_vae`` holds out."""
    if held_out is train:
        return "train"
    return HELD_OUT if isinstance(held_out, Subset) else "test"


def _open_split(data: str, split: str) -> tuple[SpeechSource, str]:
    """A part of a data set, and what it is called in the report."""
    if split != "test":
        return open_speech(data, split), split
    train, held_out = open_speech_with_held_out(data)
    return held_out, name_of_held_out(train, held_out)


def _rebuild(
    vae: SigmaVAE, source: SpeechSource, folder: Path, device: torch.device, progress: Progress
) -> Iterator[AudioPair]:
    """Encode and decode what is fit and has a text; write both sides and a list of them."""
    rate, limits = vae.speech.sample_rate, ClipLimits(needs_text=True)
    vae.to(device)
    rows: list[dict[str, Any]] = []
    for index in range(len(source)):
        try:
            clip = source[index]
            check_clip(clip, limits)
        except DataError as error:
            progress.warn(f"Skipped: {error}")
            continue
        original = prepare(clip, rate)
        media = torch.from_numpy(original).to(device)[None, None]
        rebuilt = rebuild(vae, media)[0, 0, : len(original)].clamp(-1.0, 1.0).cpu().numpy()
        name = f"{len(rows):06d}.wav"
        write_wav(folder / name, rebuilt, rate)
        write_wav(folder / "originals" / name, original, rate)
        rows.append({"file": name, "text": clip.text, "original": f"originals/{name}"})
        yield AudioPair(name, original, rebuilt)
    if not rows:
        raise DataError(f"{source.name} has no recording with a transcript there.")
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
