"""Images of noise, a random extractor to see them with, and a pickle that means harm."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

from latentlm_core.evaluation.classifier import (
    ClassifierConfig,
    ClassifierExtractor,
    ImageClassifier,
)
from latentlm_core.runtime import generator, seeded_init

SIZE = 16


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


class Hostile:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
