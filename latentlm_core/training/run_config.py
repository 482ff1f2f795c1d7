"""The configuration of a run: what of it must be the same when the run goes on."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from latentlm_core.config import Config
from latentlm_core.errors import ArtifactError

Schema = Config | Mapping[str, "Schema"]
"""What plain values were made of, where that is known."""

_ABSENT = object()


def require_same(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    schema: Schema,
    free: frozenset[str],
    folder: Path,
) -> None:
    """Refuse to go on with a run of another configuration.

    Args:
        saved: the configuration of the checkpoint.
        current: the one asked for; both are plain JSON values.
        schema: what ``current`` was made of: a field that ``saved`` lacks had its default.
        free: dotted keys that may differ.
        folder: of the run.

    Raises:
        ArtifactError: the two differ, naming every difference.
    """
    changed = differences(with_defaults(saved, current, schema), current, free)
    if changed:
        raise ArtifactError(
            f"{folder} was started with another configuration: {'; '.join(changed)}.",
            hint=_way_out(saved, current),
        )


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: frozenset[str] = frozenset()
) -> list[str]:
    """How two nested configurations differ, ``a.b is 1 there and 2 here``.

    Args:
        saved: the configuration of the checkpoint.
        current: the one asked for, of plain JSON values too.
        free: dotted keys that may differ.
    """
    there, here = dict(_flat(saved)), dict(_flat(current))
    return [
        f"{key} is {there.get(key, 'absent')!r} there and {here.get(key, 'absent')!r} here"
        for key in sorted(there.keys() | here.keys())
        if key not in free and there.get(key, _ABSENT) != here.get(key, _ABSENT)
    ]


def with_defaults(
    saved: Mapping[str, Any], current: Mapping[str, Any], schema: Schema
) -> dict[str, Any]:
    """``saved`` with the defaults of the fields that were not there yet when it was written.

    Args:
        saved: plain JSON values.
        current: the configuration asked for, as plain JSON values too.
        schema: what ``current`` was made of; keys that it does not know stay as they are.
    """
    filled = dict(saved)
    for key, value in current.items():
        part = schema.get(key) if isinstance(schema, Mapping) else getattr(schema, key, None)
        if key not in saved and isinstance(schema, Config):
            field = type(schema).model_fields[key]
            if not field.is_required():
                filled[key] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif isinstance(part, Config | Mapping) and isinstance(saved.get(key), Mapping):
            filled[key] = with_defaults(saved[key], value, part)
    return filled


def _way_out(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What to do about a run of another configuration.

    Precision is named because it may differ where the user changed nothing but the machine.
    """
    there, here = (config["trainer"]["precision"] for config in (saved, current))
    example = f" (--set trainer.precision={there})" if there != here else ""
    return f"Use the settings it was started with{example}, or another --out."


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
