"""Tables of the `datasets` library: parquet folders and sets on the hub; those that hold images.

What is read here of a ``datasets.Dataset`` a ``StreamedTable`` answers as well.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentlm_core.data.annotations import as_caption, as_question
from latentlm_core.data.base import Example, Question
from latentlm_core.data.blocks import Streamed
from latentlm_core.data.media import read_image
from latentlm_core.data.streamed_table import StreamedTable
from latentlm_core.errors import DataError, LatentLMError, did_you_mean

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")
CAPTION_COLUMNS = ("text", "caption", "captions", "description", "prompt", "txt")
QUESTIONS_COLUMN = "questions"
QUESTION_COLUMNS = "question", "answer"
SPLITS = {"train": ("train",), "test": ("validation", "valid", "val", "test")}


class ColumnSource:
    """A table with an image column; labels, captions and questions where it has such columns.

    The image is the first column of that type; the label is the column of a usual name, else the
    first of class labels; a caption is a text or a list of texts; questions are a column of
    {question, answer}, or one of questions beside one of answers, where an answer may be a list,
    of which the most frequent one counts; keys are row numbers. Of a stream no files are read that
    its cells only name.

    Args:
        table: a ``datasets.Dataset``, or a ``StreamedTable``.
        name: what it is called in messages.

    Attributes:
        streamed: where its items come from that are read in blocks, see ``blocks.streamed``.

    Raises:
        DataError: the table has no image column, or labels that are no classes.
        ArtifactError: a stream cannot be read.
    """

    def __init__(self, table: Any, name: str) -> None:
        import datasets

        self.name = name
        features = dict(table.features)
        images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise DataError(f"{name} has no image column; it has: {', '.join(features)}.")
        self._image = images[0]
        self._label = _label_column(features)
        self._caption = next((key for key in CAPTION_COLUMNS if _is_texts(features.get(key))), None)
        self._asked = _question_columns(features)
        self.classes = self._class_names(table)
        wanted = {self._image, self._label, self._caption, *self._asked} - {None}
        self._table = table.select_columns([key for key in features if key in wanted]).cast_column(
            self._image, datasets.Image(decode=False)
        )
        self.streamed = streamed_rows(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        key = f"{index:08d}"
        with one_sentence(f"{key} cannot be read"):
            row = self._table[index]
        cell = row[self._image] or {}
        is_file = cell.get("path") and self.streamed is None
        content = cell.get("bytes") or (Path(cell["path"]) if is_file else b"")
        caption = as_caption(row[self._caption]) if self._caption else None
        label = self._checked_label(row, key)
        return Example(read_image(content, key), label, caption, key, self._questions(row))

    def _questions(self, row: dict[str, Any]) -> tuple[Question, ...]:
        match self._asked:
            case ():
                return ()
            case (column,):
                pairs = [(item["question"], item["answer"]) for item in row[column] or () if item]
            case question, answer:
                pairs = [(row[question], row[answer])]
        return tuple(found for pair in pairs if (found := as_question(*pair)))

    def _class_names(self, table: Any) -> tuple[str, ...]:
        if self._label is None:
            return ()
        names = getattr(table.features[self._label], "names", None)
        if names is not None:
            return tuple(names)
        largest = _largest(table, self._label)
        if largest >= MAX_CLASSES:
            raise DataError(
                f"{self.name}: the column {self._label} goes up to {largest}, so it holds no "
                f"classes (at most {MAX_CLASSES})."
            )
        return tuple(str(label) for label in range(largest + 1))

    def _checked_label(self, row: dict[str, Any], key: str) -> int | None:
        """Sets without labels in a split write -1."""
        label = row[self._label] if self._label else None
        if label is None or label == -1:
            return None
        if not 0 <= label < len(self.classes):
            raise DataError(f"{key} has the label {label} of {len(self.classes)} classes.")
        return int(label)


MAX_CLASSES = 1_000_000


def streamed_rows(table: Any) -> Streamed | None:
    """What a source over a table says of its blocks (``blocks.streamed``)."""
    return Streamed(table, range(len(table))) if isinstance(table, StreamedTable) else None


def open_parquet(paths: Sequence[Path], name: str) -> ColumnSource:
    """Read parquet files as one table, in the order given.

    Raises:
        DataError: they cannot be read or hold no images.
    """
    return ColumnSource(read_parquet(paths, name), name)


def read_parquet(paths: Sequence[Path], name: str) -> Any:
    """The ``datasets.Dataset`` of parquet files.

    Raises:
        DataError: they cannot be read.
    """
    hint = f"Files: {', '.join(path.name for path in paths[:3])}"
    with quiet() as datasets, one_sentence(f"{name} cannot be read as parquet", hint):
        return datasets.Dataset.from_parquet([str(path) for path in paths])


def find_parquet(folder: Path, split: str) -> list[Path]:
    """Parquet files of a split: those that begin with its name, or all for `train` if none do."""
    every = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    named = {
        known: [path for path in every if path.name.startswith(prefixes)]
        for known, prefixes in SPLITS.items()
    }
    return every if split == "train" and not any(named.values()) else named[split]


def open_hub(place: str, split: str, name: str) -> ColumnSource | None:
    """Load an image set from the hub; arguments and None as ``read_hub``.

    Raises:
        DataError: as ``read_hub``, or it holds no images.
    """
    table = read_hub(place, split, name)
    return None if table is None else ColumnSource(table, name)


def read_hub(place: str, split: str, name: str, streaming: bool = False) -> Any | None:
    """Load a set from the hub, or from the local cache of the `datasets` library.

    Args:
        place: ORG/NAME[:SPLIT]. A split that is named is the whole set, which is `train`: there is
            nothing else to hold out.
        split: `train` or `test`, for which near names are tried.
        name: what it is called in messages.
        streaming: read it while it is downloaded.

    Returns:
        A ``datasets.Dataset``, or its ``IterableDataset`` of a stream; None where the set has no
        part for `test`.

    Raises:
        DataError: it cannot be loaded, or has no split to train on or of the name given.
    """
    repository, own_split = split_of(place, name)
    if own_split and split == "test":
        return None
    hint = "Check the name, the network, and `hf auth login` if the set is gated."
    with quiet() as datasets, one_sentence(f"{name} cannot be loaded from the hub", hint):
        part = choose_split(own_split, split, datasets.get_dataset_split_names(repository), name)
        if part is None:
            return None
        return datasets.load_dataset(repository, split=part, streaming=streaming)


def split_of(place: str, name: str) -> tuple[str, str]:
    """ORG/NAME[:SPLIT] as its two parts, the second of which may be empty.

    Raises:
        DataError: it is of another form.
    """
    repository, _, own_split = place.partition(":")
    if repository.count("/") > 1 or not repository:
        raise DataError(f"{name} is not of the form hf:ORG/NAME or hf:ORG/NAME:SPLIT.")
    return repository, own_split


def choose_split(own_split: str, split: str, known: Sequence[str], name: str) -> str | None:
    """The split of a set of the hub that is read for `train` or `test`.

    Args:
        own_split: the one that the user names, or nothing.
        split: `train` or `test`, for which near names are tried.
        known: the splits that there are.
        name: of the set, for messages.

    Returns:
        None where the set has no part for `test`.

    Raises:
        DataError: it has none to train on, or none of the name given.
    """
    names = (own_split,) if own_split else SPLITS[split]
    part = next((part for part in names if part in known), None)
    if part is None and split == "train":
        raise DataError(f"{name}: no split {names[0]!r}. {did_you_mean(names[0], known)}")
    return part


@contextmanager
def one_sentence(message: str, hint: str | None = None) -> Iterator[None]:
    """Network, permission, scripts, damaged tables: the library lets everything through.

    Raises:
        DataError: the message with the reason.
        LatentLMError: the one that was raised.
    """
    try:
        yield
    except LatentLMError:
        raise
    except Exception as error:
        raise DataError(f"{message}: {_reason(error)}.", hint) from None


def is_text(kind: Any) -> bool:
    """Whether a feature of a table is a string."""
    return getattr(kind, "dtype", None) in ("string", "large_string")


@contextmanager
def quiet() -> Iterator[Any]:
    """The `datasets` module with its progress bars off for the time being."""
    import datasets

    was_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if not was_off:
            datasets.enable_progress_bars()


def _is_texts(kind: Any) -> bool:
    """Whether a feature is a string or a list of strings."""
    import datasets

    lists = datasets.List, datasets.LargeList
    return is_text(kind.feature if isinstance(kind, lists) else kind)


def _question_columns(features: dict[str, Any]) -> tuple[str, ...]:
    """The column of lists of questions and answers, or the two of one each, or none."""
    cell = getattr(features.get(QUESTIONS_COLUMN), "feature", None)
    if isinstance(cell, dict) and _are_asked(cell):
        return (QUESTIONS_COLUMN,)
    return QUESTION_COLUMNS if _are_asked(features) else ()


def _are_asked(features: dict[str, Any]) -> bool:
    question, answer = (features.get(key) for key in QUESTION_COLUMNS)
    return is_text(question) and _is_texts(answer)


def _largest(table: Any, column: str) -> int:
    """The largest number of a column; -1 where it has none."""
    if isinstance(table, StreamedTable):
        return table.largest(column)
    return max((cell for cell in table[column] if cell is not None), default=-1)


def _label_column(features: dict[str, Any]) -> str | None:
    import datasets

    usual = [key for key in LABEL_COLUMNS if _is_integer(features.get(key))]
    typed = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    return next((key for key in usual if key in typed), next(iter(typed + usual), None))


def _is_integer(kind: Any) -> bool:
    return str(getattr(kind, "dtype", "")).startswith(("int", "uint"))


def _reason(error: BaseException) -> str:
    import datasets

    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        error = error.__cause__ or error  # itself it says no more than its name
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
