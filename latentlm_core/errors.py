"""Everything that can go wrong through no fault of the program, as one tree.

    LatentLMError            shown to the user as one sentence (and a hint), exit code 1
    ├── ConfigError          a recipe, an option or a combination of them
    ├── DataError            a data set, an image, a latent set
    │   └── CorruptFileError a file that is damaged, truncated or not what its name says
    ├── ArtifactError        a run, an export, a checkpoint, a hub repository
    │   └── BusyError        another process is writing it
    ├── MissingExtraError    an optional package is not installed
    ├── TrainingError        a run that cannot go on (non-finite loss, say)
    └── LostProcessError     another process of this command has ended

Anything else that escapes is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

MAX_NAMES = 30
"""Names that a message lists at most."""
MAX_CHARS = 4000
"""Characters of a message; what is longer is cut in the middle."""


class LatentLMError(Exception):
    """Base of every error that is meant for the user, in one line that any terminal can show.

    Args:
        message: one sentence: what, where, and what is allowed.
        hint: what to do about it, when there is something to do.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.hint = None if hint is None else printable(hint)


class ConfigError(LatentLMError):
    """A recipe, an option or a combination of them is not allowed."""


class DataError(LatentLMError):
    """A data set, an image or a latent set cannot be used."""


class CorruptFileError(DataError):
    """A file is damaged, truncated, or not what its name says."""


class ArtifactError(LatentLMError):
    """A run, an export, a checkpoint or a hub repository cannot be used."""


class BusyError(ArtifactError):
    """Another process is writing the same folder."""


class TrainingError(LatentLMError):
    """A training run cannot go on."""


class LostProcessError(LatentLMError):
    """Another process of the same command has ended, so this one cannot go on."""


class MissingExtraError(LatentLMError):
    """An optional package is not installed.

    Args:
        package: the package as pip names it.
        purpose: what it was wanted for.
        extra: the extra of latentlm that brings it, if one does.
    """

    def __init__(self, package: str, purpose: str, extra: str | None = None) -> None:
        command = f'pip install "latentlm[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{purpose} needs the package {package}.", hint=f"Install it: {command}")


def printable(text: str) -> str:
    """``text`` with escapes for what a terminal would obey: names may come from anywhere."""
    if len(text) > MAX_CHARS:
        text = f"{text[: MAX_CHARS // 2]} ... {text[-MAX_CHARS // 2 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that lists the allowed words, the near ones first."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    rest = len(names) - MAX_NAMES
    more = f" and {rest} more" if rest > 0 else ""
    return f"Known: {', '.join(names[:MAX_NAMES])}{more}."
