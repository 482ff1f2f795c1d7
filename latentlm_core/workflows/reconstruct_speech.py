"""``latentlm eval recon`` of speech: a sigma-VAE => how well it gives recordings back.

What is fit is found out first, so that the recordings have their numbers before any is encoded and
several processes can take them in turn. Both sides are left beside the report.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentlm_core.artifacts import LoadedTokenizer
from latentlm_core.data.audio import ClipLimits, check_clip, prepare, write_wav
from latentlm_core.data.base import SpeechSource
from latentlm_core.data.sources import Subset, spread
from latentlm_core.data.speech_sources import open_speech, open_speech_with_held_out
from latentlm_core.errors import DataError
from latentlm_core.evaluation.recognition import load_recogniser, normaliser
from latentlm_core.evaluation.speakers import load_speaker_encoder
from latentlm_core.evaluation.speech import speaker_similarity, word_errors
from latentlm_core.evaluation.speech_quality import (
    AudioPair,
    installed_metrics,
    reconstruction_quality,
)
from latentlm_core.evaluation.spoken_items import read_spoken_items, write_scores
from latentlm_core.files import write_json, write_text
from latentlm_core.processes import current
from latentlm_core.progress import Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.workflows.reports import report_file, report_folder
from latentlm_core.workflows.vae_jobs import rebuild

HELD_OUT = "what train-vae holds out of train"
"""The split of a reconstruction report where the data has no test split."""


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
    target = report_file(out, report_folder(tokenizer.folder, vae) / "recon.json")
    processes, heard = current(), target.with_suffix("")
    with processes.main_first():
        source, part = _open_split(data, split)
        listener = None if recogniser is None else load_recogniser(recogniser, device)
        voices = None if encoder is None else load_speaker_encoder(encoder, device)
    rule = normaliser(normalise)
    chosen = spread(source, num_samples)
    texts = _fit_texts(chosen, progress)
    pairs = _rebuild(tokenizer.model, chosen, list(texts), heard, device)
    rate = tokenizer.model.speech.sample_rate
    quality = reconstruction_quality(
        pairs, len(texts), rate, installed_metrics(), progress=progress
    )
    processes.once(lambda: _write_list(heard, list(texts.values())))
    warnings = list(quality.warnings)
    if part == "train":
        warnings.append(
            "The tokenizer may have been trained on these recordings: they are of train."
        )
        progress.warn(warnings[-1])
    values: dict[str, Any] = dict(quality.values)
    details = quality.to_dict()
    items = read_spoken_items(heard)
    recordings = [replace(item, file=item.original) for item in items if item.original]
    if listener is not None:
        for name, side in (("recordings", recordings), ("reconstructions", items)):
            report = word_errors(side, listener, rule, progress=progress)
            values[f"wer_{name}"] = report.values["wer"]
            details[f"wer_{name}"] = report.to_dict()
            scores = heard / f"wer-{name}.jsonl"
            processes.once(partial(write_scores, scores, report.rows))
    if voices is not None:
        similarity = speaker_similarity(items, voices, progress=progress)
        values["sim_original"] = similarity.values.get("sim_original")
        details["sim"] = similarity.to_dict()
    processes.once(lambda: write_scores(heard / "quality.jsonl", quality.rows))
    details |= {
        "split": part,
        "data": data,
        "vae": str(tokenizer.folder),
        "vae_sha256": tokenizer.sha256,
        "values": values,
        "warnings": warnings,
    }
    processes.once(lambda: write_json(target, finite(details)))
    figures = values | {"recordings": len(items), "split": part}
    files = {"report": str(target), "heard": str(heard)}
    return Result("Reconstruction of speech", figures, files, details)


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


def _fit_texts(source: SpeechSource, progress: Progress) -> dict[int, str]:
    """The transcripts of all recordings that are fit and have one, by their places."""
    limits = ClipLimits(needs_text=True)

    def look(index: int) -> tuple[int, str | None, str]:
        try:
            clip = source[index]
            check_clip(clip, limits)
        except DataError as error:
            return index, None, str(error)
        return index, clip.text, ""

    texts = {}
    with progress.bar(f"reading {source.name}", len(source), "clips") as bar:
        for index, text, fault in current().shared(look, range(len(source))):
            if text is None:
                progress.warn(f"Skipped: {fault}")
            else:
                texts[index] = text
            bar.advance()
    if not texts:
        raise DataError(f"{source.name} has no recording with a transcript there.")
    return texts


def _rebuild(
    vae: SigmaVAE, source: SpeechSource, places: Sequence[int], folder: Path, device: torch.device
) -> Iterator[AudioPair]:
    """Encode and decode the recordings at some places, this process's own, and write both sides."""
    rate = vae.speech.sample_rate
    vae.to(device)
    for number, place in current().own(enumerate(places)):
        original = prepare(source[place], rate)
        media = torch.from_numpy(original).to(device)[None, None]
        rebuilt = rebuild(vae, media)[0, 0, : len(original)].clamp(-1.0, 1.0).cpu().numpy()
        name = f"{number:06d}.wav"
        write_wav(folder / name, rebuilt, rate)
        write_wav(folder / "originals" / name, original, rate)
        yield AudioPair(name, original, rebuilt)


def _write_list(folder: Path, texts: Sequence[str]) -> None:
    """A list of what ``_rebuild`` wrote there."""
    names = [f"{number:06d}.wav" for number in range(len(texts))]
    rows = [
        {"file": name, "text": text, "original": f"originals/{name}"}
        for name, text in zip(names, texts, strict=True)
    ]
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
