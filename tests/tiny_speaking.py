"""A folder of recordings, and a workspace in which a tiny model has learned to say them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentlm_core import workflows
from latentlm_core.artifacts import load_generator, save_tokenizer
from latentlm_core.data.audio import read_audio, write_wav
from latentlm_core.data.base import Samples
from latentlm_core.export_config import TokenizerExport
from latentlm_core.files import write_json, write_text
from latentlm_core.progress import SILENT
from latentlm_core.result import Result
from latentlm_core.runtime import seeded_init
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.workflows.speaking import Speaking
from tests.tiny_speech_task import NETWORK, RATE

HOP = NETWORK.hop_length
FRAME_RATE = RATE / HOP
"""25 latents a second."""
STEP = 1.01 / 32768
"""One step of 16 bits: kernels for other sizes round differently."""
SPEAKERS = ("anna", "bert")
LONGEST_SECONDS = 3.6
"""Of the longest utterance of a speaker, in train and in test."""

RECIPE: dict[str, Any] = {
    "model": {
        "kind": "latent-lm",
        "backbone": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 64,
        },
        "head": {"num_layers": 1, "intermediate_size": 64},
    },
    "data": {"kind": "speech", "batch_size": 4, "row_length": 512, "held_out": 0.1},
    "trainer": {"total_steps": 40, "save_every": 40, "validate_every": 40, "precision": "float32"},
    "optimizer": {"lr": 3e-3, "warmup_steps": 5},
    # so that text and voice count for something in a model that has hardly learned
    "sampler": {"guidance_scale": 20.0, "num_inference_steps": 2},
}


def babble(seed: int, seconds: float) -> np.ndarray:
    """Noise that swells three times a second, (S,)."""
    size = round(seconds * RATE)
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * np.arange(size) / RATE)
    return (0.2 * swell * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def write_recordings(folder: Path) -> None:
    """Of each speaker 6 to learn from and 3 held out, with texts of 20 characters a second."""
    for split, count in (("train", 6), ("test", 3)):
        for place, speaker in enumerate(SPEAKERS):
            for number in range(count):
                seconds = LONGEST_SECONDS if number == 2 else 0.5 + 0.1 * number + 0.05 * place
                stem = folder / split / speaker / f"{number}"
                write_wav(stem.with_suffix(".wav"), babble(10 * number + place, seconds), RATE)
                words = f"{split} {speaker} {number} " * 6
                write_text(stem.with_suffix(".txt"), words[: round(20 * seconds)].strip())


def make_home(folder: Path) -> Path:
    """A tokenizer, latents and a model below ``folder``, to be used as the workspace."""
    write_recordings(folder / "speech")
    config = SigmaVAEConfig(latent_channels=4, network=NETWORK)
    with seeded_init("tiny speaking"):
        vae = build_tokenizer(config)
    save_tokenizer(folder / "runs/vae/export", vae, TokenizerExport(tokenizer=config))
    write_json(folder / "recipe.json", RECIPE)
    spec = str(folder / "speech")
    vae_run = str(folder / "runs/vae")
    workflows.tokenize(data=spec, vae=vae_run, out=folder / "latents/speech", device="cpu")
    recipe = str(folder / "recipe.json")
    workflows.train_lm(
        data=str(folder / "latents/speech"), recipe=recipe, out=folder / "runs/lm", device="cpu"
    )
    return folder


def speak(out: Path | None = None, **settings: Any) -> Result:
    return workflows.speak(out=out, **{"device": "cpu", **settings})


def speaking_of(home: Path) -> Speaking:
    loaded = load_generator(home / "runs/lm/export", torch.device("cpu"))
    return Speaking.of(loaded, None, torch.device("cpu"), SILENT)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def stem(index: int) -> str:
    """Name of the file of a sample."""
    return f"{index:06d}.wav"


def audio_of(path: Path) -> Samples:
    samples, sample_rate = read_audio(path, str(path))
    assert sample_rate == RATE
    return samples
