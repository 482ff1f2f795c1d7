"""What an examination found: one line each, with what to do about it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from latentlm_core.errors import LatentLMError

State = Literal["ok", "warning", "fault"]

NUM_LISTED = 5
"""Names, steps or items that a message lists at most."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name, one of its own in each examination.
        state: ``fault`` is what does not work; ``warning`` what may spoil a result, is not finished
            or could not be examined.
        message: what is there and, unless that is ``ok``, what to do.
    """

    what: str
    state: State
    message: str


def ok(what: str, message: str) -> Finding:
    """A thing as it should be."""
    return Finding(what, "ok", message)


def warning(what: str, message: str) -> Finding:
    """A thing to know of."""
    return Finding(what, "warning", message)


def fault(what: str, message: str) -> Finding:
    """A thing that does not work."""
    return Finding(what, "fault", message)


def unread(what: str, error: LatentLMError, state: State = "fault") -> Finding:
    """A thing that was refused: the sentence of the refusal and its hint."""
    hint = f" {error.hint.rstrip('.')}." if error.hint else ""
    return Finding(what, state, f"{error}{hint}")


def within(place: str, findings: Iterable[Finding]) -> list[Finding]:
    """Findings of a part, named as such."""
    return [replace(finding, what=f"{place} {finding.what}") for finding in findings]


def listed(names: Sequence[object]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NUM_LISTED
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(map(str, names[:NUM_LISTED])) + more
