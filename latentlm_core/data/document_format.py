"""How text and images are written as sequences, in training and in sampling.

    bos text eos                                text
    bos caption bod latents eod eos             an image after its caption
    bos bod latents eod caption eos             a caption after its image
    bos bod latents eod question NEWLINE answer eos [question NEWLINE answer eos ...]
    bos null bod latents eod eos                an image whose condition was dropped
    bos text bod latents eod text bod latents eod ... eos

All images of a model have one grid, so nothing says that latents go on, and ``eod`` follows the
last of them by rule. When an image begins is for the model to say, by ``bod`` among the words.

Axes: T latent positions, C latent channels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from latentlm_core.data.documents import Document, DocumentBuilder
from latentlm_core.tokenizers.text import TextTokenizer

ANSWER = "\n"
"""Stands between a question and its answer, so that a caption is never taken for one."""


class TextSpan(NamedTuple):
    """Tokens of a text.

    Attributes:
        ids: text ids, ``null`` for a condition that was dropped.
        learn: whether they are predicted, and after them that an image begins, if one does.
    """

    ids: Sequence[int]
    learn: bool = True


class ImageSpan(NamedTuple):
    """An image.

    Attributes:
        latents: (T, C) normalised latents.
        learn: whether they are predicted; an image that text is to answer to is only read.
    """

    latents: Tensor
    learn: bool = True


class DocumentFormat:
    """Text and images as sequences of tokens and latents.

    Args:
        text: the text tokenizer.
        latent_channels: C.
    """

    def __init__(self, text: TextTokenizer, latent_channels: int) -> None:
        self.text = text
        self.latent_channels = latent_channels

    @property
    def nothing(self) -> TextSpan:
        """What stands before an image whose condition was dropped."""
        return TextSpan([self.text.marks.null], learn=False)

    def question(self, question: str) -> TextSpan:
        """A question that waits for its answer."""
        return TextSpan(self.text.encode(question + ANSWER), learn=False)

    def answered(self, questions: Sequence[tuple[str, str]]) -> list[TextSpan]:
        """Questions with their answers, each of which ends as a document does."""
        words: list[TextSpan] = []
        for question, answer in questions:
            if words:
                words[-1] = TextSpan([*words[-1].ids, self.text.marks.eos])
            words += [self.question(question), TextSpan(self.text.encode(answer))]
        return words

    def document(self, pieces: Sequence[TextSpan | ImageSpan], key: str) -> Document:
        """A whole document, its end to be predicted."""
        return self._written(pieces).tokens([self.text.marks.eos], learn=True).finish(key)

    def prompt(self, pieces: Sequence[TextSpan | ImageSpan], draw: bool = False) -> Document:
        """A document that breaks off: where an image begins, if ``draw``, else where words may."""
        builder = self._written(pieces)
        if draw:
            builder.tokens([self.text.marks.bod])
        return builder.finish("prompt")

    def text_ids(self, text: str) -> list[int]:
        """A text with its ends, as ``stretch`` takes them."""
        marks = self.text.marks
        return [marks.bos, *self.text.encode(text), marks.eos]

    def stretch(self, ids: Sequence[int], key: str) -> Document:
        """Some of ``text_ids``: all of them, or a part of a text that is too long for a row."""
        return DocumentBuilder(self.latent_channels).tokens(ids, learn=True).finish(key)

    def stretches(self, text: str, key: str, length: int) -> Iterator[Document]:
        """A text in pieces of at most ``length`` elements, to predict all of it once.

        The last token of one piece is the first of the next, so that only ``bos`` is not predicted.
        """
        ids = self.text_ids(text)
        for start in range(0, len(ids) - 1, length - 1):
            yield self.stretch(ids[start : start + length], key)

    def _written(self, pieces: Sequence[TextSpan | ImageSpan]) -> DocumentBuilder:
        marks, builder = self.text.marks, DocumentBuilder(self.latent_channels)
        builder.tokens([marks.bos])
        is_foretold = False
        for piece in pieces:
            if isinstance(piece, TextSpan):
                builder.tokens(piece.ids, learn=piece.learn)
                is_foretold = piece.learn
            else:
                builder.tokens([marks.bod], learn=is_foretold)
                builder.latents(piece.latents, learn=piece.learn).tokens([marks.eod])
                is_foretold = piece.learn
        return builder
