"""A mix of the shapes and texts of ``tiny_multimodal``, its parts, and what their documents say."""

from pathlib import Path
from typing import Any

from latentlm_core.data.document_format import DocumentFormat
from latentlm_core.data.documents import Document
from latentlm_core.data.mix_parts import CaptionedImages, Directions, PairPart, Part
from latentlm_core.data.mixture import Mixture, MultimodalDataConfig
from latentlm_core.data.shards import LatentSet
from latentlm_core.layout import Kind
from latentlm_core.progress import SILENT
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from latentlm_core.workflows.training_data import OpenedMix, TrainingData
from tests.tiny_multimodal import ROW_LENGTH, mix_of

TEXT = TextTokenizer(TextConfig())
MARKS = TEXT.marks
CHANNELS = 3
FORMAT = DocumentFormat(TEXT, CHANNELS)
CONFIG = MultimodalDataConfig(batch_elements=512, row_length=ROW_LENGTH, held_out=0.2)
EVEN = Directions(draw=1.0, describe=1.0, ask=1.0)


def captioned_of(home: Path) -> CaptionedImages:
    latents = LatentSet.open(home / "latents/shapes")
    return CaptionedImages(latents, latents.manifest.stats(latents.posterior))


def mixture(home: Path, spec: str | None = None, seed: int = 0, **changes: Any) -> Mixture:
    data = TrainingData.open(spec or mix_of(home), True, SILENT)
    config = CONFIG.model_copy(update=changes)
    return OpenedMix(data, config, seed).mixture(CHANNELS)


def pairs(captioned: CaptionedImages, seed: int = 0, **changes: Any) -> PairPart:
    settings: dict[str, Any] = {
        "directions": EVEN,
        "max_questions": 1,
        "condition_drop": 0.0,
        "learn_leading": False,
        "held_out": 0.2,
        "seed": seed,
    }
    return PairPart(captioned, FORMAT, **(settings | changes))


def drawn(part: Part, count: int, seed: int = 0) -> list[Document]:
    source = generator(seed, "draws")
    return [part.document(place, source) for place in range(count)]


def written(document: Document) -> list[str]:
    """What a document is made of: its words, and ``[]`` for each image."""
    pieces: list[str] = []
    words: list[int] = []
    names = {MARKS.bos: "bos", MARKS.eos: "eos", MARKS.null: "null"}
    for token, kind in zip(document.ids.tolist(), document.kind.tolist(), strict=True):
        if kind == Kind.TEXT and token < TEXT.num_text_ids:
            words.append(token)
            continue
        if words:
            pieces.append(TEXT.decode(words))
            words = []
        if kind == Kind.TEXT and token in names:
            pieces.append(names[token])
        elif token == MARKS.bod:
            pieces.append("[]")
    return pieces + ([TEXT.decode(words)] if words else [])


def direction_of(document: Document) -> str:
    pieces = written(document)[1:-1]
    if pieces[0] == "[]":
        return "ask" if "\n" in pieces[1] else "describe"
    return "dropped" if pieces[0] == "null" else "draw"
