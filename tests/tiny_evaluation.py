"""Images of noise, networks with random weights to draw and see them, and a pickle of harm."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

from latentlm_core.artifacts import save_generator, save_tokenizer
from latentlm_core.evaluation.classifier import (
    ClassifierConfig,
    ClassifierExtractor,
    ImageClassifier,
)
from latentlm_core.export_config import GeneratorExport, TokenizerExport
from latentlm_core.files import sha256_file
from latentlm_core.runtime import generator, seeded_init
from latentlm_core.sampling import SamplerConfig
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from tests.test_models import tiny_latent_lm

SIZE = 16
DATA = "embedded:shapes"
VAE, LM = Path("runs/vae/export"), Path("runs/lm/export")
SMALL = SamplerConfig(num_inference_steps=2)


def pixels(count: int = 24, seed: int = 0, size: int = SIZE) -> np.ndarray:
    random = generator("pixels", seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=random).numpy().astype(np.uint8)


def random_extractor(seed: int) -> ClassifierExtractor:
    config = ClassifierConfig(data="nothing", classes=("a", "b", "c"), image_size=SIZE, width=4)
    with seeded_init(seed):
        return ClassifierExtractor(ImageClassifier(config))


def save_pngs(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        PILImage.fromarray(image).save(folder / f"{index:06d}.png")


def make_home(folder: Path) -> Path:
    """A workspace with the runs of an untrained tokenizer and LatentLM, and a judge."""
    network = ConvConfig(image_size=32, channels=(8, 8), stem_patch_size=4)
    shape = SigmaVAEConfig(latent_channels=8, network=network)
    save_tokenizer(folder / VAE, build_tokenizer(shape), TokenizerExport(tokenizer=shape))
    model = tiny_latent_lm()
    config = GeneratorExport(
        model=model.config,
        stats=LatentStats(shift=(0.0,), scale=(1.0,)),
        grid=(4, 4),
        classes=tuple("0123456789"),
        tokenizer_sha256=sha256_file(folder / VAE / "model.safetensors"),
        sampler=SMALL,
        provenance={"data": DATA},
    )
    save_generator(folder / LM, model, config, folder / VAE)
    for export in (VAE, LM):
        (folder / export.parent / "metrics.jsonl").touch()
    ImageClassifier(
        ClassifierConfig(data=DATA, classes=tuple("abcd"), image_size=32, width=4)
    ).save(folder / "judge")
    return folder


class Hostile:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
