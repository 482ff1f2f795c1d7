"""Interleaved documents of a file, whose images are examples of a latent set."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from latentlm_core.data.document_format import DocumentFormat, ImageSpan, TextSpan
from latentlm_core.data.documents import Document
from latentlm_core.data.mix_parts import CaptionedImages
from latentlm_core.data.order import EpochOrder
from latentlm_core.data.shards import LatentSet
from latentlm_core.errors import DataError


class FilePart:
    """Interleaved documents of a file, whose images are examples of a latent set.

    Args:
        name: of the file.
        rows: as ``read_documents`` gives them.
        captioned: the images.
        document_format: how documents are written.
        held_out: share of the documents; other parts may train on their images.
        seed: of the run.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Sequence[str | int]],
        captioned: CaptionedImages,
        document_format: DocumentFormat,
        held_out: float,
        seed: int,
    ) -> None:
        self.name = name
        self._captioned, self._format, self._rows = captioned, document_format, rows
        self._order = EpochOrder(len(self._rows), held_out, seed, 1, self.name)

    def document(self, place: int, source: torch.Generator) -> Document:
        """See ``Part``."""
        return self._write(self._order[place], source)

    def held_out(self, source: torch.Generator) -> Iterator[Document]:
        """See ``Part``."""
        return (self._write(number, source) for number in self._order.held_out.tolist())

    def _write(self, number: int, source: torch.Generator) -> Document:
        pieces: list[TextSpan | ImageSpan] = []
        for piece in self._rows[number]:
            if isinstance(piece, str):
                pieces.append(TextSpan(self._format.text.encode(piece)))
            else:
                record = self._captioned.record(piece, source)
                pieces.append(
                    ImageSpan(self._captioned.picture(record, source), learn=bool(pieces))
                )
        return self._format.document(pieces, f"{self.name}:{number + 1}")


def read_documents(path: Path, latents: LatentSet) -> list[list[str | int]]:
    """Interleaved documents: of each its words, and the indices of its images in ``latents``.

    A line of the file is ``{"pieces": ["words", {"image": KEY}, ...]}``.

    Raises:
        DataError: the file cannot be read, or names what is not there.
    """
    indices = {latents.key(index): index for index in range(len(latents))}
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    rows = [
        _read_row(line, f"{path}:{number}", indices)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path} holds no documents.")
    return rows


def _read_row(line: str, where: str, indices: dict[str, int]) -> list[str | int]:
    try:
        found = json.loads(line)["pieces"]
        if not isinstance(found, list):
            raise TypeError
        pieces = [piece if isinstance(piece, str) else str(piece["image"]) for piece in found]
        is_image = [not isinstance(piece, str) for piece in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f'{where} is not of the form {{"pieces": ["words", {{"image": KEY}}]}}.'
        ) from None
    if not pieces:
        raise DataError(f"{where} has no pieces.")
    told = list(zip(pieces, is_image, strict=True))
    missing = next((name for name, image in told if image and name not in indices), None)
    if missing is not None:
        raise DataError(f"{where} names the image {missing!r}, which the latent set has not.")
    return [indices[name] if image else name for name, image in told]
