"""Small sets of parquet files and of archives, and the same images as a plain folder of them."""

import io
import tarfile
from itertools import pairwise

import datasets
import numpy as np
import PIL.Image
import soundfile

CLASSES = ["cat", "dog", "owl"]
BROKEN = b"no image at all"


def picture(index, size=10):
    """A PNG that no other index has."""
    pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder, count, *, num_files=3, group_rows=8, broken=(), prefix="", start=0):
    """``count`` images in parquet files with row groups of ``group_rows``."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=CLASSES),
            "text": datasets.Value("string"),
            "heavy": datasets.Value("binary"),
        }
    )
    edges = [start + count * k // num_files for k in range(num_files + 1)]
    for number, (first, end) in enumerate(pairwise(edges)):
        rows = range(first, end)
        cells = [BROKEN if index in broken else picture(index) for index in rows]
        table = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": cell, "path": f"{k}.png"} for k, cell in enumerate(cells)],
                "label": [index % len(CLASSES) for index in rows],
                "text": [f"number {index}" for index in rows],
                "heavy": [bytes(2000)] * len(rows),
            },
            features=features,
        )
        table.to_parquet(str(folder / f"{prefix}{number:03d}.parquet"), batch_size=group_rows)
    return folder


def write_archives(folder, counts, labels=True):
    """Tar files as WebDataset has them, so many images in each."""
    folder.mkdir(parents=True, exist_ok=True)
    index = 0
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as archive:
            for _ in range(count):
                members = {"png": picture(index), "txt": f"number {index}".encode()}
                if labels:
                    members["cls"] = str(index % 3).encode()
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{index:05d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                index += 1
    return folder


def write_recordings(folder, count, group_rows=4):
    """A parquet file of short recordings of two speakers."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = []
    for index in range(count):
        noise = np.random.default_rng(index).uniform(-0.3, 0.3, 1600 + 100 * index)
        buffer = io.BytesIO()
        soundfile.write(buffer, noise.astype(np.float32), 8000, format="WAV")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    table = datasets.Dataset.from_dict(
        {
            "audio": cells,
            "text": [f"clip {index}" for index in range(count)],
            "speaker": [("anna", "bert")[index % 2] for index in range(count)],
        }
    )
    table = table.cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(str(folder / "train.parquet"), batch_size=group_rows)
    return folder


def upload(folder, url):
    """Copy a folder to a URL."""
    import fsspec

    file_system, root = fsspec.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            file_system.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


def same_example(left, right):
    return (
        np.array_equal(left.image, right.image)
        and (left.label, left.caption, left.key) == (right.label, right.caption, right.key)
        and left.questions == right.questions
    )
