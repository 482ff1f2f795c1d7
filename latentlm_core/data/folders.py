"""Folders of image files: a class-per-folder tree, or flat, with captions beside the images.

    bear.png    an image
    bear.txt    its captions, one a line
    metadata.jsonl
                captions and questions of any images of the folder (``annotations``), which go
                before text files

Notable choices:
    the order is that of the relative paths, and these are the keys;
    links are followed, each real folder once, so that a loop of links ends;
    hidden files and folders are not looked at;
    images in the folder itself as well as in sub-folders: all are taken, none has a class.
"""

import os
from pathlib import Path, PurePosixPath

from latentlm_core.data.annotations import METADATA, Annotation, read_metadata
from latentlm_core.data.base import Example
from latentlm_core.data.media import SUFFIXES, read_image
from latentlm_core.errors import CorruptFileError, DataError

SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("val", "validation", "valid", "test")}
"""Names of the sub-folders that are taken for a split, the first that is there: tests often have
no labels, so they come last."""
MAX_CAPTION_BYTES = 65_536


class FolderSource:
    """Image files under a folder.

    Labels are the first parts of the relative paths where every image lies in a sub-folder.
    The caption is that of ``metadata.jsonl``, else the text file of the same stem.

    Args:
        root: the folder.
        name: what it is called in messages.

    Raises:
        DataError: the folder cannot be read or holds no image, or its metadata is not of its form.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._root = root
        self._paths = find_files(root, SUFFIXES)
        if not self._paths:
            raise DataError(f"{name} holds no images ({', '.join(SUFFIXES)}).")
        folders = _sub_folders(root) if all(os.sep in path for path in self._paths) else []
        self._labels = {folder: label for label, folder in enumerate(folders)}
        self.classes = tuple(readable(folder) for folder in folders)
        has_metadata = (root / METADATA).is_file()
        self._noted = read_metadata(root / METADATA, self._paths) if has_metadata else {}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        relative = self._paths[index]
        path = self._root / relative
        key = readable(PurePosixPath(*Path(relative).parts).as_posix())
        label = self._labels.get(Path(relative).parts[0])
        noted = self._noted.get(relative, Annotation())
        caption = noted.caption or read_beside(path.with_suffix(".txt"), key, "caption")
        return Example(read_image(path, key), label, caption, key, noted.questions)


def find_split(root: Path, split: str) -> Path | None:
    """The sub-folder of ``split``; the folder itself for `train` if it is not in parts.

    It is in parts where it has a sub-folder for `train`, and one for `test` or no other.

    Returns:
        None where there is no part for ``split``.
    """
    found = {
        known: next((root / name for name in names if (root / name).is_dir()), None)
        for known, names in SPLIT_FOLDERS.items()
    }
    is_parted = found["train"] and (found["test"] or len(_sub_folders(root)) == 1)
    if not is_parted:  # a folder called train may also be a class: the vehicle
        return root if split == "train" else None
    return found[split]


def find_files(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Relative paths of all files of such names, sorted by their parts.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, children, names in os.walk(root, followlinks=True, onerror=_refuse):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            children.clear()
            continue
        seen.add(identity)
        children[:] = sorted(child for child in children if not child.startswith("."))
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.split(os.sep))


def read_beside(path: Path, key: str, what: str) -> str | None:
    """The text of a small file beside the item ``key``, its ``what``.

    Returns:
        None where there is no such file, or nothing in it.

    Raises:
        CorruptFileError: it cannot be read.
        DataError: it is longer than 64 KiB.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise CorruptFileError(f"{key}: its {what} cannot be read: {error.strerror}.") from None
    if len(text) > MAX_CAPTION_BYTES:
        raise DataError(f"{key}: its {what} is longer than {MAX_CAPTION_BYTES} bytes.")
    return text.decode("utf-8", "replace").strip() or None


def readable(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 become replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def _sub_folders(root: Path) -> list[str]:
    """Every sub-folder, the empty ones included: splits of one set then agree on the labels."""
    return sorted(
        child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.")
