"""The whole path on speech: a synthetic voice, learned by a sigma-VAE and a LatentLM.

    runs/demo-speech-vae  latents/demo-speech  runs/demo-speech-lm  samples/demo-speech   and OUT/

The sentences are of a small grammar and spoken by hibari-tts; those of the test part were heard by
nothing that is trained. What the samples say is judged by a recogniser that is trained apart.
"""

import shutil
from pathlib import Path
from typing import Any

from latentlm_core import workflows
from latentlm_core.demo.stages import Stages, result_table
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.progress import Progress
from latentlm_core.report import Block, Command, Picture, ReportPage, Section, Sound
from latentlm_core.result import Result

DATA = "hibari"
NUM_SAMPLES = 60
"""Sentences of the test part that are said with the voice of another recording."""
NUM_PLAYED = 6
NEXT = 'latentlm sample --text "three one four" --out said'


def demo_speech(*, out: Path, seed: int, device: str, progress: Progress) -> Result:
    """Train, tokenize, train, speak and measure on sentences of a synthetic voice.

    Arguments as ``demo``.

    Returns:
        word error rates and times, and the report.

    Raises:
        MissingExtraError: the voice or the recogniser is not installed.
    """
    stages = Stages("demo-speech", DATA, out=out, seed=seed, device=device, progress=progress)
    timer, same = stages.timer, stages.same
    vae = stages.train_vae()
    latents = stages.tokenize()
    model = stages.train_lm(latents.files["latents"])
    samples = timer.run(
        "speak",
        lambda: workflows.speak(
            model=str(stages.folder("runs", "-lm")),
            protocol="reference-utterance",
            data=DATA,
            num_samples=NUM_SAMPLES,
            seed=seed,
            out=stages.folder("samples"),
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
        "seconds in all": timer.total,
    }
    shutil.copyfile(samples.files["spectrograms"], out / "spectrograms.png")
    page = _page(stages, figures, folder, vae, model, judged)
    return stages.report("Demo of speech", page, str(folder), NEXT)


def _page(
    stages: Stages,
    figures: dict[str, Any],
    folder: Path,
    vae: Result,
    model: Result,
    judged: Result,
) -> ReportPage:
    played: list[Block] = [
        Sound(item.file, item.text) for item in read_spoken_items(folder)[:NUM_PLAYED]
    ]
    return ReportPage(
        title="LatentLM learns to speak",
        lead=(
            "A sigma-VAE turns speech into 12.5 continuous latents a second, a causal Transformer "
            "with a diffusion head learns to write them after a text, and every sound below was "
            f"drawn by it. Trained from nothing on {stages.machine}."
        ),
        figures=figures,
        sections=[
            Section(
                "Samples",
                "Sentences that were not in the training, not selected.",
                [
                    Picture(folder / "spectrograms.png", "Spectrograms of these samples"),
                    *played,
                    Command(NEXT),
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
                    stages.timer.table(),
                ],
            ),
        ],
        details=stages.details(vae=vae, model=model, evaluation=judged),
    )
