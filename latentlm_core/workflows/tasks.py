"""What a user asks of a model of text and images, as documents to go on with."""

from collections.abc import Sequence
from pathlib import Path

from latentlm_core.data.base import Image
from latentlm_core.data.media import read_image
from latentlm_core.data.mix_parts import captions_of
from latentlm_core.data.sources import open_source, spread
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.files import read_json
from latentlm_core.processes import current
from latentlm_core.workflows.writing import Question, Task

MAX_TOKENS = 256
"""Tokens that are written at most where the user says nothing."""
MAX_IMAGES = 8
"""Images that are drawn in an interleaved document at most where the user says nothing."""
MAX_SHOWN = 40
"""Characters of a prompt that a message shows."""


def asked_tasks(
    *,
    prompts: Sequence[str],
    captions_of: Sequence[Path],
    question: str | None,
    images: Sequence[Path],
    text_only: Sequence[str],
    interleaved: Path | None,
    data: str | None,
    max_tokens: int,
) -> list[Task]:
    """What is asked in words and files; nothing where it is the captions of ``data``.

    Args:
        prompts: what to draw.
        captions_of: image files to describe.
        question: about each of ``images``.
        images: image files that the question is about.
        text_only: texts to go on with.
        interleaved: a JSON file of words and images to go on with.
        data: a data set whose captions are asked for instead.
        max_tokens: of each task that writes.

    Raises:
        ConfigError: not exactly one kind of prompt was given, or a question without an image.
        LatentLMError: a file cannot be read.
    """
    kinds = {
        "--prompt": bool(prompts),
        "--caption": bool(captions_of),
        "--ask": question is not None or bool(images),
        "--text-only": bool(text_only),
        "--interleaved": interleaved is not None,
        "--data": data is not None,
    }
    given = [option for option, is_given in kinds.items() if is_given]
    if len(given) != 1:
        what = f"{' and '.join(given)} exclude each other" if given else "There is no prompt"
        raise ConfigError(f"{what}: name one of {', '.join(kinds)}.")
    if bool(images) != (question is not None):
        raise ConfigError(
            "--ask is a question about each --image, so neither goes without the other."
        )
    return [
        *map(draw_task, prompts),
        *(describe_task(path, max_tokens) for path in captions_of),
        *(ask_task(path, question or "", max_tokens) for path in images),
        *(text_task(text, max_tokens) for text in text_only),
        *([] if interleaved is None else [interleaved_task(interleaved, max_tokens)]),
    ]


def draw_task(prompt: str) -> Task:
    """An image of a prompt; of an empty one any image."""
    pieces = (prompt,) if prompt else ()
    name = f"The prompt {_short(prompt)!r}"
    return Task(pieces, name, prompt, draw=True, num_images=1)


def describe_task(path: Path, max_tokens: int) -> Task:
    """The caption of an image file."""
    image = read_image(path, str(path))
    return Task((image,), str(path), path.stem, num_tokens=max_tokens)


def ask_task(path: Path, question: str, max_tokens: int) -> Task:
    """The answer to a question about an image file."""
    pieces = (read_image(path, str(path)), Question(question))
    return Task(pieces, str(path), question, num_tokens=max_tokens)


def text_task(text: str, max_tokens: int) -> Task:
    """A text that goes on."""
    pieces = (text,) if text else ()
    return Task(pieces, f"The text {_short(text)!r}", text, num_tokens=max_tokens)


def interleaved_task(path: Path, max_tokens: int) -> Task:
    """A document out of a JSON file: ``["words", {"image": "FILE"}, {"question": "..."}, ...]``.

    Paths of images are relative to the file's folder.

    Raises:
        ArtifactError: the file is not there.
        CorruptFileError: it is no JSON.
        DataError: it is not of that form.
    """
    found = read_json(path)
    if not isinstance(found, list):
        raise DataError(f"{path} is no list of pieces. {_FORM}")
    pieces = tuple(_piece(piece, path, number) for number, piece in enumerate(found, 1))
    return Task(pieces, str(path), path.stem, num_tokens=max_tokens, num_images=MAX_IMAGES)


class CaptionTasks(Sequence[Task]):
    """Images of the captions of a data set.

    Args:
        data: a data set.
        split: train or test.
        count: how many, from all over the set; None takes all.

    Raises:
        DataError: an example has no caption, as soon as it is asked for.
    """

    def __init__(self, data: str, split: str, count: int | None) -> None:
        with current().main_first():
            self._source = spread(open_source(data, split), count)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Task:  # type: ignore[override]
        example = self._source[index]
        captions = captions_of(example.caption)
        if not captions:
            raise DataError(f"{example.key} of {self._source.name} has no caption to draw.")
        return draw_task(captions[0])


_FORM = 'A document is like ["words", {"image": "a.png"}, {"question": "what is it?"}].'


def _piece(piece: object, path: Path, number: int) -> str | Question | Image:
    match piece:
        case str():
            return piece
        case {"image": str() as name, **rest} if not rest:
            return read_image(path.parent / name, str(path.parent / name))
        case {"question": str() as question, **rest} if not rest:
            return Question(question)
    raise DataError(f"Piece {number} of {path} is neither words, an image nor a question. {_FORM}")


def _short(text: str) -> str:
    """A text as a message shows it."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
