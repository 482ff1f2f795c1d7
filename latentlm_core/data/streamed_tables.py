"""Tables that are read block by block, by name.

    stream:hf:ORG/NAME[:SPLIT]  a set of the hub
    stream:FOLDER               parquet files, or tar files as WebDataset has them
    stream:URL                  such a folder, or one such file, of any place that fsspec reads:
                                s3://BUCKET/FOLDER, hf://datasets/ORG/NAME/FOLDER, https://.../FILE

Of parquet files the row groups are read at random; other files are read forwards.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from latentlm_core.data.columns import SPLITS, choose_split, one_sentence, quiet, split_of
from latentlm_core.data.forward_files import ForwardFiles
from latentlm_core.data.parquet_files import ParquetFiles
from latentlm_core.data.remote import digest, is_url, open_filesystem, reaching
from latentlm_core.data.streamed_table import StreamedTable
from latentlm_core.errors import DataError

STREAM, HUB = "stream:", "hf:"
PARQUET, ARCHIVES = ".parquet", ".tar"


def open_streamed_table(spec: str, split: str) -> StreamedTable | None:
    """Open a set that is read while it is used.

    Args:
        spec: ``stream:`` and what this module's text lists.
        split: `train` or `test`.

    Returns:
        None where the set has no part for `test`.

    Raises:
        DataError: it is of no such form, or has no such files, rows or split.
        ArtifactError: it cannot be reached.
        MissingExtraError: a package that reads such URLs is not installed.
    """
    place = spec.removeprefix(STREAM)
    if place.startswith(HUB) and not is_url(place):
        return _open_hub(place.removeprefix(HUB), split, spec)
    return _open_folder(place, split, spec)


def _open_hub(place: str, split: str, name: str) -> StreamedTable | None:
    repository, own_split = split_of(place, name)
    if own_split and split == "test":
        return None
    hint = "Check the name, the network, and `hf auth login` if the set is gated."
    with quiet() as datasets, one_sentence(f"{name} cannot be loaded from the hub", hint):
        builder = datasets.load_dataset_builder(repository)
        of_splits = {str(known): urls for known, urls in (builder.config.data_files or {}).items()}
        known = list(of_splits or map(str, builder.info.splits or ()))
        part = choose_split(own_split, split, known, name)
        if part is None:
            return None
        if builder.name == "parquet":
            return StreamedTable(ParquetFiles(list(of_splits[part]), name), name)
        table = builder.as_streaming_dataset(part)
        key = digest(builder.hash, part, *of_splits.get(part, [repository]))
        return StreamedTable(ForwardFiles(table, key, name), name)


def _open_folder(place: str, split: str, name: str) -> StreamedTable | None:
    file_system, root = open_filesystem(place)
    with reaching(place):
        is_file = file_system.isfile(root)
        if not is_file and not file_system.isdir(root):
            raise DataError(
                f"{name}: there is no folder or file {place}.",
                hint="A stream is stream:hf:ORG/NAME[:SPLIT], stream:FOLDER or stream:URL.",
            )
        listed = [root] if is_file else sorted(file_system.ls(root, detail=False))
    visible = [path for path in listed if not PurePosixPath(path).name.startswith(".")]
    for suffix in (PARQUET, ARCHIVES):
        if every := [path for path in visible if path.endswith(suffix)]:
            break
    else:
        raise DataError(f"{name}: there are no {PARQUET} or {ARCHIVES} files in {place}.")
    paths = _of_split(every, split)
    if not paths:
        return None
    urls = [file_system.unstrip_protocol(path) for path in paths] if is_url(place) else paths
    if suffix == PARQUET:
        return StreamedTable(ParquetFiles(urls, name), name)
    with reaching(place):
        keys = [file_system.ukey(path) for path in paths]
    with quiet() as datasets, one_sentence(f"{name} cannot be read"):
        files = {"train": list(urls)}
        builder = datasets.load_dataset_builder("webdataset", data_files=files)
        table = builder.as_streaming_dataset("train")
        return StreamedTable(ForwardFiles(table, digest(*urls, *keys), name), name)


def _of_split(paths: Sequence[str], split: str) -> Sequence[str]:
    """Files of a split: those that begin with its name, or all for `train` if none do."""
    named = {
        known: [path for path in paths if PurePosixPath(path).name.startswith(prefixes)]
        for known, prefixes in SPLITS.items()
    }
    return paths if split == "train" and not any(named.values()) else named[split]
