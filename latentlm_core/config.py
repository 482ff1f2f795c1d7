"""Configuration: frozen, strict, and able to name everything that is wrong at once.

A ``Config`` is a pydantic model. It is built from plain mappings (a recipe, a TOML or JSON file,
``--set a.b=c``), hashed by its content and written beside every result.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentlm_core.errors import ConfigError, did_you_mean

Width = Annotated[int, Field(ge=1, le=2**24)]
"""Channels, ids or samples: more than any network has, for a file of strangers may ask for any."""
Depth = Annotated[int, Field(ge=1, le=512)]
"""Blocks, likewise."""


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON: equal configurations have equal digests."""
        return digest_of(self.to_dict())


C = TypeVar("C", bound=Config)


def digest_of(value: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the canonical JSON of an object."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def build(kind: type[C], data: Mapping[str, Any], where: str) -> C:
    """Validate ``data`` as a ``kind``.

    Args:
        kind: the configuration class.
        data: plain JSON values.
        where: what the values came from, for the message.

    Raises:
        ConfigError: naming every problem, with the near spellings of unknown keys.
    """
    try:
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = [_sentence(kind, item) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems) + ".") from None


def override(data: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of ``data`` with ``a.b=value`` assignments applied; values are TOML, else strings.

    Raises:
        ConfigError: naming every assignment that is not of the form ``key=value``, or whose key
            goes through a plain value.
    """
    result = json.loads(json.dumps(data))
    problems = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not equals or not all(path):
            problems.append(f"--set {assignment!r} is not KEY=VALUE")
            continue
        node = result
        for part in path[:-1]:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            problems.append(f"--set {key!r} goes through a value that has no keys")
            continue
        node[path[-1]] = _parse(value.strip())
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    return result  # type: ignore[no-any-return]


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file as plain values.

    Raises:
        ConfigError: the file is missing, is neither ``.toml`` nor ``.json``, or does not parse.
    """
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path} must end in .toml or .json.")
    try:
        text = path.read_text("utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {path}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold an object at its top, not a {type(data).__name__}.")
    return data


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return None if value == "null" else value


def _sentence(kind: type[Config], item: Any) -> str:
    keys, known = _walk(kind, item["loc"])
    path = ".".join(_printable(key) for key in keys) or "the whole"
    if item["type"] == "extra_forbidden":
        near = f" ({did_you_mean(str(keys[-1]), known)})" if known else ""
        return f"unknown key {path}{near}"
    if item["type"] == "missing":
        return f"{path} is missing"
    message = str(item["msg"]).removeprefix("Value error, ").rstrip(".")
    shown = json.dumps(item["input"], default=str)
    return f"{path} = {shown[:80]}: {message[:1].lower()}{message[1:]}"


def _printable(part: object) -> str:
    text = str(part)
    return text if text.isprintable() else ascii(text)


def _walk(kind: type[Config], places: tuple[int | str, ...]) -> tuple[list[int | str], list[str]]:
    """The keys of an error's place without the tags of unions, and what is allowed at its end."""
    here: list[type[BaseModel]] = [kind]
    keys: list[int | str] = []
    for place in places:
        tagged = [model for model in here if _tag(model) == place]
        if tagged and len(here) > 1:
            here = tagged
            continue
        keys.append(place)
        allowed = sorted({name for model in here for name in model.model_fields})
        fields = [model.model_fields[str(place)] for model in here if place in model.model_fields]
        here = [model for field in fields for model in _models(field.annotation)]
    return keys, allowed if places else []


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configurations that an annotation names: itself, or the members of a union."""
    options = get_args(annotation) or (annotation,)
    return [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]
