"""``latentlm eval wer | sim | drift | recon`` of speech: samples or a sigma-VAE => figures.

Each figure has its report ``evaluation/NAME.json`` beside what was measured, every single score a
row of ``evaluation/NAME.jsonl`` with its file, and WER a page to listen to.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from latentlm_core.artifacts import LoadedTokenizer
from latentlm_core.data.audio import ClipLimits, check_clip, prepare, write_wav
from latentlm_core.data.base import Clip
from latentlm_core.data.sources import spread
from latentlm_core.data.speech_sources import open_speech, open_speech_with_held_out
from latentlm_core.errors import DataError
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
        side: ``originals`` measures the recordings of the same texts that lie beside them.
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
    listener = load_recogniser(recogniser, resolve_device(device))
    report = word_errors(items, listener, normaliser(normalise), progress=progress)
    name = _named("wer", side)
    where = out or _folder(path) / EVALUATION / f"{name}.json"
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
    voices = load_speaker_encoder(encoder, resolve_device(device))
    report = speaker_similarity(items, voices, progress=progress)
    where = out or _folder(path) / EVALUATION / "sim.json"
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
    where = resolve_device(device)
    listener, voices = load_recogniser(recogniser, where), load_speaker_encoder(encoder, where)
    understood = word_errors(items, listener, normaliser(normalise), progress=progress)
    report = measure_drift(
        items, understood, voices, window_seconds=window_seconds, progress=progress
    )
    figures: dict[str, Any] = {
        f"wer_part_{part.part + 1}": part.wer for part in report.wer_parts
    } | {f"sim_from_{place.start_seconds:g}s": place.sim_prompt for place in report.sim_positions}
    target = out or _folder(path) / EVALUATION / "drift.json"
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
    target = out or report_folder(tokenizer.folder, vae) / "recon.json"
    clips = _clips(data, split, num_samples, progress)
    pairs = _rebuild_all(tokenizer.model, clips, target.with_suffix(""), device, progress)
    rate = tokenizer.model.speech.sample_rate
    quality = reconstruction_quality(
        pairs, len(pairs), rate, installed_metrics(), progress=progress
    )
    values: dict[str, Any] = dict(quality.values)
    details = quality.to_dict()
    items = read_spoken_items(target.with_suffix(""))
    recordings = [replace(item, file=item.original) for item in items if item.original]
    if recogniser is not None:
        listener, rule = load_recogniser(recogniser, device), normaliser(normalise)
        for name, side in (("recordings", recordings), ("reconstructions", items)):
            report = word_errors(side, listener, rule, progress=progress)
            values[f"wer_{name}"] = report.values["wer"]
            details[f"wer_{name}"] = report.to_dict()
            write_scores(target.with_suffix("") / f"wer-{name}.jsonl", report.rows)
    if encoder is not None:
        voices = load_speaker_encoder(encoder, device)
        similarity = speaker_similarity(items, voices, progress=progress)
        values["sim_original"] = similarity.values.get("sim_original")
        details["sim"] = similarity.to_dict()
    write_scores(target.with_suffix("") / "quality.jsonl", quality.rows)
    details |= {
        "split": split,
        "data": data,
        "vae": str(tokenizer.folder),
        "vae_sha256": tokenizer.sha256,
        "values": values,
    }
    write_json(target, finite(details))
    figures = values | {"recordings": len(items), "split": split}
    files = {"report": str(target), "heard": str(target.with_suffix(""))}
    return Result("Reconstruction of speech", figures, files, details)


def _items(
    samples: str | None, side: Side, count: int | None, progress: Progress
) -> tuple[Path, list[SpokenItem]]:
    path = find_samples(samples, progress)
    items = read_spoken_items(path)[:count]
    if side == "samples":
        return path, items
    swapped = [(item, item.original if side == "originals" else item.prompt) for item in items]
    found = [replace(item, file=other) for item, other in swapped if other is not None]
    if not found:
        raise DataError(f"{path} has no {side} beside its samples.")
    return path, found


def _named(metric: str, side: Side) -> str:
    return metric if side == "samples" else f"{metric}-{side}"


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _reported(
    name: str,
    path: Path,
    details: dict[str, Any],
    figures: dict[str, Any],
    rows: Sequence[Any],
    where: Path,
    page: Path | None = None,
) -> Result:
    settings_path = _folder(path) / "settings.json"
    settings = read_json(settings_path) if settings_path.is_file() else None
    model = settings.get("model_sha256") if isinstance(settings, dict) else None
    whole = {"model_sha256": model, **details, "samples_settings": settings}
    write_json(where, finite(whole))
    write_scores(where.with_suffix(".jsonl"), rows)
    files = {"report": str(where), "scores": str(where.with_suffix(".jsonl"))}
    if page is not None:
        files["page"] = str(page)
    return Result(name, figures, files, whole)


def _clips(data: str, split: str, count: int | None, progress: Progress) -> list[Clip]:
    """Readable clips with a text, from all over a part of a data set."""
    source = open_speech_with_held_out(data)[1] if split == "test" else open_speech(data, split)
    limits = ClipLimits(needs_text=True)
    found = []
    chosen = spread(source, count)
    for index in range(len(chosen)):
        try:
            clip = chosen[index]
            check_clip(clip, limits)
        except DataError as error:
            progress.warn(f"Skipped: {error}")
            continue
        found.append(clip)
    if not found:
        raise DataError(f"{data} has no recording with a transcript in its split {split!r}.")
    return found


def _rebuild_all(
    vae: SigmaVAE, clips: Sequence[Clip], folder: Path, device: torch.device, progress: Progress
) -> list[AudioPair]:
    """Encode and decode clips; write both sides and a list of them."""
    rate = vae.speech.sample_rate
    vae.to(device)
    pairs, rows = [], []
    with progress.bar("reconstructing", len(clips), "clips") as bar:
        for number, clip in enumerate(clips):
            original = prepare(clip, rate)
            media = torch.from_numpy(original).to(device)[None, None]
            rebuilt = rebuild(vae, media)[0, 0, : len(original)].clamp(-1.0, 1.0).cpu().numpy()
            name = f"{number:06d}.wav"
            write_wav(folder / name, rebuilt, rate)
            write_wav(folder / "originals" / name, original, rate)
            pairs.append(AudioPair(name, original, rebuilt))
            rows.append({"file": name, "text": clip.text, "original": f"originals/{name}"})
            bar.advance()
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return pairs
