"""Published weights as they lie in a folder: one file of safetensors, or shards with an index.

Nothing is trusted: shards lie in the folder itself, those without a wanted tensor stay closed, and
names and shapes are known from the headers before memory is taken for a tensor.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from latentlm_core.errors import ArtifactError, CorruptFileError
from latentlm_core.files import WEIGHTS_FILE, read_json

INDEX_FILE = "model.safetensors.index.json"
"""Which shard holds which tensor."""

_PLAIN = re.compile(r"[\w.-]+\.safetensors")
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where each tensor of a folder lies; ``in_folder`` finds out.

    Attributes:
        folder: the folder.
        places: name of the file of each tensor.
        listing: name of the index, if there is one.
    """

    folder: Path
    places: dict[str, str]
    listing: tuple[str, ...] = ()

    @classmethod
    def in_folder(cls, folder: Path) -> "WeightFiles":
        """The weights of a folder, model.safetensors before shards; no tensor is read.

        Raises:
            ArtifactError: there are none.
            CorruptFileError: the file or the index is damaged, or names a file outside.
        """
        if (folder / WEIGHTS_FILE).is_file():
            with open_weights(folder / WEIGHTS_FILE) as file:
                return cls(folder, dict.fromkeys(file.keys(), WEIGHTS_FILE))
        path = folder / INDEX_FILE
        if not path.is_file():
            raise ArtifactError(
                f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}."
            )
        index = read_json(path)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict):
            raise CorruptFileError(f"{path} has no weight_map of tensors and their files.")
        for place in places.values():
            if not isinstance(place, str) or _PLAIN.fullmatch(place) is None:
                raise CorruptFileError(
                    f"{path} names {place!r}, which is not a safetensors file of the folder itself."
                )
        return cls(folder, places, (INDEX_FILE,))

    def shapes(self, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of these tensors, from the headers.

        Raises:
            ArtifactError: a file is not there, or a tensor is of another type than F32, F16, BF16.
            CorruptFileError: a file is damaged, or does not hold what the index says.
        """
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._visit(names)}

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors one at a time, as float32, file by file; errors as ``shapes``."""
        for name, file in self._visit(names):
            yield name, file.get_tensor(name).float()

    def files(self, names: Collection[str]) -> list[str]:
        """Names of the index and of the files that hold these tensors."""
        return [*self.listing, *sorted({self.places[name] for name in names})]

    def _visit(self, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Each tensor's name with its opened file."""
        for place in sorted({self.places[name] for name in names}):
            path = self.folder / place
            with open_weights(path) as file:
                for name in (name for name in names if self.places[name] == place):
                    dtype = file.get_slice(name).get_dtype()
                    if dtype not in _DTYPES:
                        raise ArtifactError(
                            f"{path}: {name} is stored as {dtype}, where one of "
                            f"{', '.join(_DTYPES)} is wanted."
                        )
                    yield name, file


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file, opened; what goes wrong with it inside the block is an error as well.

    Raises:
        ArtifactError: the file is not there.
        CorruptFileError: it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{path} is damaged or no safetensors file ({error}).") from None
