"""What a command found, ready for a table, for JSON and for a report."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """The answer of one workflow.

    Attributes:
        title: what was done, a few words.
        figures: the numbers that a person wants to see, in order.
        files: what was written, by what it is.
        details: everything needed to repeat it: protocol, configuration, versions. JSON values.
    """

    title: str
    figures: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)
