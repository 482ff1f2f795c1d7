"""A folder of samples that belongs to one set of settings."""

from pathlib import Path
from typing import Any

from latentlm_core.errors import ArtifactError
from latentlm_core.files import read_json, write_json


class ClaimedFolder:
    """Samples of one model, seed and setting; of other settings it takes none.

    Args:
        path: the folder.
        settings: JSON values that decide the samples.
    """

    suffix = ".png"
    """Of the samples' files."""
    others: tuple[str, ...] = ()
    """Suffixes of what is written beside them."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings

    def claim(self) -> None:
        """Take the folder for these settings.

        Raises:
            ArtifactError: it holds other samples, or files of somebody else.
        """
        path = self.path / "settings.json"
        if path.exists():
            self._compare(read_json(path))
        else:
            self._refuse_strangers()
        write_json(path, self.settings)

    def file(self, index: int) -> Path:
        """The file of a sample."""
        return self.path / f"{index:06d}{self.suffix}"

    def missing(self, count: int) -> list[int]:
        """Which of the first ``count`` samples are not there yet."""
        return [index for index in range(count) if not self.file(index).is_file()]

    def _refuse_strangers(self) -> None:
        for suffix in (self.suffix, *self.others):
            if any(self.path.glob(f"*{suffix}")):
                raise ArtifactError(
                    f"{self.path} holds {suffix} files that are not ours.",
                    hint="Use another --out.",
                )

    def _compare(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise ArtifactError(f"{self.path / 'settings.json'} is not an object.")
        names = sorted(found.keys() | self.settings.keys())
        differing = [name for name in names if found.get(name) != self.settings.get(name)]
        if differing:
            raise ArtifactError(
                f"{self.path} holds samples of other settings ({', '.join(differing)} differ).",
                hint="Use another --out.",
            )
