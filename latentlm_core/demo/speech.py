"""The whole path on speech: a synthetic voice, learned by a sigma-VAE and a LatentLM.

    runs/demo-speech-vae  latents/demo-speech  runs/demo-speech-lm  samples/demo-speech   and OUT/

The sentences are of a small grammar and spoken by hibari-tts; those of the test part were heard by
nothing that is trained. What the samples say is judged by a recogniser that is trained apart.
"""

import shutil
from pathlib import Path
from typing import Any

from latentlm_core import workflows
from latentlm_core.demo.timer import Timer, result_table
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import (
    Block,
    Command,
    Picture,
    ReportPage,
    Section,
    Sound,
    Table,
    write_report,
)
from latentlm_core.result import Result
from latentlm_core.runtime import machine, resolve_device, versions
from latentlm_core.workflows.workspace import workspace

DATA = "hibari"
NUM_SAMPLES = 60
"""Sentences of the test part that are said with the voice of another recording."""
NUM_PLAYED = 6


def demo_speech(
    *,
    out: Path = Path("demo"),
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Train, tokenize, train, speak and measure on sentences of a synthetic voice.

    Args:
        out: folder of the report; runs, latents and samples go where they always go.
        seed: of everything.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        word error rates and times, and the report.

    Raises:
        MissingExtraError: the voice or the recogniser is not installed.
    """
    home, suffix = workspace(), f"-seed{seed}" if seed else ""
    runs = home / "runs"
    same: dict[str, Any] = {"device": device, "progress": progress}
    seeded = [f"trainer.seed={seed}"]
    timer = Timer(out / "seconds.json")

    vae = timer.run(
        "train the sigma-VAE",
        lambda: workflows.train_vae(
            data=DATA, recipe=DATA, overrides=seeded, out=runs / f"demo-speech-vae{suffix}", **same
        ),
    )
    latents = timer.run(
        "tokenize",
        lambda: workflows.tokenize(
            data=DATA,
            vae=str(runs / f"demo-speech-vae{suffix}"),
            out=home / "latents" / f"demo-speech{suffix}",
            **same,
        ),
    )
    model = timer.run(
        "train the LatentLM",
        lambda: workflows.train_lm(
            data=latents.files["latents"],
            recipe=DATA,
            overrides=seeded,
            out=runs / f"demo-speech-lm{suffix}",
            **same,
        ),
    )
    samples = timer.run(
        "speak",
        lambda: workflows.speak(
            model=str(runs / f"demo-speech-lm{suffix}"),
            protocol="reference-utterance",
            data=DATA,
            num_samples=NUM_SAMPLES,
            seed=seed,
            out=home / "samples" / f"demo-speech{suffix}",
            **same,
        ),
    )
    folder = Path(samples.files["samples"])
    judge: dict[str, Any] = {"samples": str(folder), "normalise": "spoken-digits", **same}
    judged = timer.run("evaluate", lambda: workflows.evaluate_wer(**judge))
    recordings = timer.run(
        "evaluate the recordings", lambda: workflows.evaluate_wer(side="originals", **judge)
    )
    figures = {
        "word error rate of the samples": judged.figures["wer"],
        "of recordings of the same sentences": recordings.figures["wer"],
        "samples that the length bound ended": samples.figures.get("ended_by_bound", 0),
        "real-time factor": samples.figures.get("real_time_factor"),
        "mel distance of reconstructions": vae.figures["mel_distance"],
        "seconds in all": round(sum(timer.seconds.values()), 1),
    }
    page = _page(figures, folder, vae, model, judged, timer, device)
    as_html, as_json = write_report(page, out)
    shutil.copyfile(samples.files["spectrograms"], out / "spectrograms.png")
    files = {"report": str(as_html), "json": str(as_json), "samples": str(folder)}
    progress.note('Next: latentlm sample --text "three one four" --out said')
    return Result("Demo of speech", figures, files, dict(page.details))


def _page(
    figures: dict[str, Any],
    folder: Path,
    vae: Result,
    model: Result,
    judged: Result,
    timer: Timer,
    device: str,
) -> ReportPage:
    where = machine(resolve_device(device))
    played: list[Block] = [
        Sound(item.file, item.text) for item in read_spoken_items(folder)[:NUM_PLAYED]
    ]
    return ReportPage(
        title="LatentLM learns to speak",
        lead=(
            "A sigma-VAE turns speech into 12.5 continuous latents a second, a causal Transformer "
            "with a diffusion head learns to write them after a text, and every sound below was "
            f"drawn by it. Trained from nothing on {where}."
        ),
        figures=figures,
        sections=[
            Section(
                "Samples",
                "Sentences that were not in the training, not selected.",
                [
                    Picture(folder / "spectrograms.png", "Spectrograms of these samples"),
                    *played,
                    Command('latentlm sample --text "three one four" --out said'),
                ],
            ),
            Section(
                "What the sigma-VAE keeps",
                "Held-out recordings above, their reconstructions below.",
                [
                    Picture(Path(vae.files["reconstructions"]), "Recordings and reconstructions"),
                    Picture(Path(vae.files["curves"]), "Training of the sigma-VAE"),
                    result_table(vae, "The sigma-VAE on held-out recordings"),
                ],
            ),
            Section(
                "How the LatentLM learned",
                "Validation loss is split by band of timesteps; t = 0 is almost clean.",
                [
                    Picture(Path(model.files["curves"]), "Training of the LatentLM"),
                    result_table(model, "The LatentLM on held-out sentences"),
                ],
            ),
            Section(
                "How it was measured",
                "The recogniser is Whisper tiny.en, out of a package; it saw nothing of the model.",
                [
                    result_table(judged, "Word errors of the samples"),
                    Table(("stage", "seconds"), list(timer.seconds.items()), "Time"),
                ],
            ),
        ],
        details={
            "machine": where,
            "versions": versions(),
            "seconds": timer.seconds,
            "vae": vae.details,
            "model": model.details,
            "evaluation": judged.details,
        },
    )
