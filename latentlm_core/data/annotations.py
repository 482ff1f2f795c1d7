"""Captions and questions of images as tables and files of metadata have them.

    {"file_name": "bear.png", "text": "a brown bear"}
    {"file_name": "a/two.png", "caption": ["two bears", "a bear and its cub"],
     "questions": [{"question": "how many bears?", "answer": "two"}]}

The file is the ``metadata.jsonl`` of the `datasets` library: a JSON object a line, paths relative
to its folder.

Notable choices:
    several captions of one image are the lines of one text;
    of several answers to one question, as several people gave them, the most frequent one counts;
    an image may have several rows, whose captions and questions add up, or none.
"""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from latentlm_core.data.base import Question
from latentlm_core.errors import CorruptFileError, DataError

METADATA = "metadata.jsonl"

Texts = str | Sequence[str | None] | None
"""A text, several, or none."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """What is known of an image.

    Attributes:
        caption: one a line, None where there is none.
        questions: what may be asked of it.
    """

    caption: str | None = None
    questions: tuple[Question, ...] = ()


def as_caption(texts: Texts) -> str | None:
    """A text as it is; of several, each on a line of its own, the empty ones left out."""
    if texts is None or isinstance(texts, str):
        return texts
    lines = (" ".join(text.split()) for text in texts if text)
    return "\n".join(line for line in lines if line) or None


def as_question(question: str | None, answer: Texts) -> Question | None:
    """A question with its most frequent answer (of several, the first); None without either."""
    answers = [answer] if isinstance(answer, str) else answer or ()
    counted = Counter(given for text in answers if (given := (text or "").strip()))
    if not counted or not (question or "").strip():
        return None
    return Question(str(question).strip(), counted.most_common(1)[0][0])


def read_metadata(path: Path, images: Collection[str]) -> dict[str, Annotation]:
    """What a file of metadata says of the images of its folder.

    Args:
        path: the file.
        images: paths of the images, relative to its folder.

    Returns:
        Annotations of those that it names.

    Raises:
        CorruptFileError: it cannot be read, or a line is not of its form.
        DataError: a line names a file that is not one of the images.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}.") from None
    known, found = frozenset(images), dict[str, Annotation]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line, f"Line {number} of {path}")
        name = os.path.normpath(row.file_name)
        if name not in known:
            raise DataError(
                f"Line {number} of {path} names {row.file_name!r}, which is no image of its folder."
            )
        found[name] = _merge(found.get(name, Annotation()), row)
    return found


class _Asked(BaseModel):
    """A question of a row."""

    model_config = ConfigDict(strict=True)

    question: str
    answer: str | list[str]


class _Row(BaseModel):
    """What is read of a line; whatever else it says is let be."""

    model_config = ConfigDict(strict=True)

    file_name: str
    text: str | list[str] | None = None
    caption: str | list[str] | None = None
    questions: list[_Asked] | None = None


def _parse(line: bytes, where: str) -> _Row:
    try:
        return _Row.model_validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise CorruptFileError(
            f"{where} is not of its form: {f'{place}: ' if place else ''}{fault['msg']}."
        ) from None


def _merge(known: Annotation, row: _Row) -> Annotation:
    texts = known.caption, as_caption(row.text), as_caption(row.caption)
    asked = (as_question(item.question, item.answer) for item in row.questions or ())
    return Annotation(
        "\n".join(stripped for text in texts if (stripped := (text or "").strip())) or None,
        (*known.questions, *filter(None, asked)),
    )
