"""The whole path, as a person would walk it, on data that a package brings: one demo a modality."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from latentlm_core.demo.image import demo_images
from latentlm_core.demo.speech import demo_speech
from latentlm_core.demo.text import demo_text
from latentlm_core.processes import refuse_several
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result

__all__ = ["demo"]

Modality = Literal["image", "speech", "text"]
DEMOS: dict[Modality, Callable[..., Result]] = {
    "image": demo_images,
    "speech": demo_speech,
    "text": demo_text,
}


def demo(
    *,
    out: Path = Path("demo"),
    modality: Modality = "image",
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Train, tokenize, train, sample and measure.

    Args:
        out: folder of the report; runs, latents and samples go where they always go.
        modality: handwritten digits; sentences of a synthetic voice; or text with images, coloured
            digits with captions and questions.
        seed: of everything.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        how good the samples are, the times, and the report.

    Raises:
        MissingExtraError: the data's package is not installed.
        ConfigError: torchrun started several processes.
    """
    refuse_several("A demo")
    return DEMOS[modality](out=out, seed=seed, device=device, progress=progress)
