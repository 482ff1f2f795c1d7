"""Latent sets at URLs: a folder in the cache that becomes one as its shards are wanted.

    manifest.json, tokenizer/    fetched when the set is opened
    remote.json                  where the shards are
    shard-00000.safetensors      fetched whole when it is first read, checked against the manifest

A folder that has remote.json is opened as any latent set, with a shard fetched where it is not
there, and fetched again where it is damaged. Threads fetch the next ones.

Notable choices:
    batches are those of a local copy, so every shard is wanted soon, and the set must fit in the
    cache; ``stream:URL`` reads shard by shard instead (``blocks.BlockOrder``), of a set of any
    size, and gives batches of its own;
    a set that was changed at its URL is refused as long as the cache has the former one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from latentlm_core import files
from latentlm_core.config import Config, build
from latentlm_core.data import remote
from latentlm_core.data.manifest import MANIFEST, Manifest, ShardEntry, read_manifest
from latentlm_core.data.shard_file import Shard
from latentlm_core.data.streamed_table import HeldBlocks
from latentlm_core.errors import ArtifactError, ConfigError, DataError, LatentLMError

REMOTE = "remote.json"
NUM_AHEAD = 4
"""Shards that are fetched ahead, and at once."""


class Remote(Config):
    """Where the shards of a latent set are."""

    url: str
    """Of the set."""


def fetch_latents(url: str) -> Path:
    """The folder in the cache that stands for the latent set at a URL.

    Raises:
        ArtifactError: there is none, it cannot be reached, or the disk refused.
        DataError: it was changed since it was first fetched, or is of a newer format.
        CorruptFileError: its manifest or its tokenizer is damaged.
        MissingExtraError: the package for that kind of URL is not installed.
    """
    url = url.rstrip("/")
    manifest = _read_manifest(url)
    name = url.rsplit("/", 1)[-1]
    folder = remote.cache_folder() / "latents" / f"{name}-{remote.digest(url)}"
    with remote.held(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _begin(folder, url, manifest)
        elif (folder / MANIFEST).read_bytes() != manifest:
            raise DataError(
                f"{url} was changed since its shards were fetched: its {MANIFEST} is another one.",
                hint=f"Remove {folder} to read the new set; a run of the former one ends here.",
            )
    return folder


def open_shards(folder: Path, manifest: Manifest, in_order: bool) -> Sequence[Shard]:
    """The shards of a latent set, all of them open, or fetched when they are read.

    Args:
        folder: of the set.
        manifest: of the set.
        in_order: they are read window by window, so that not all need to be there at once.

    Raises:
        ConfigError: not in order, and the cache cannot hold them all.
        CorruptFileError: a shard is not what the manifest says.
    """
    if not is_remote(folder):
        return [Shard(folder, manifest, entry) for entry in manifest.shards]
    place = build(Remote, files.read_json(folder / REMOTE), str(folder / REMOTE))
    total = sum(entry.num_bytes for entry in manifest.shards)
    if not in_order and total > remote.cache_bytes():
        raise ConfigError(
            f"{place.url} has {total / 1e9:.3g} GB of latents, and the cache may hold "
            f"{remote.cache_bytes() / 1e9:.3g} GB (LATENTLM_CACHE_GB).",
            hint=f"Let it hold more, or read the set shard by shard: --data stream:{place.url}",
        )
    return FetchedShards(folder, manifest, place.url, in_order)


def is_remote(folder: Path) -> bool:
    """Whether a folder of the cache stands for a latent set at a URL."""
    return (folder / REMOTE).is_file()


class FetchedShards(Sequence[Shard]):
    """The shards of a set at a URL.

    Args:
        folder: that stands for the set in the cache.
        manifest: of the set.
        url: of the set.
        in_order: who reads says what is wanted next (``expect``); else the next ones are fetched.
    """

    def __init__(self, folder: Path, manifest: Manifest, url: str, in_order: bool) -> None:
        self._folder, self._manifest, self._url = folder, manifest, url
        self._in_order = in_order
        sizes = [entry.num_bytes for entry in manifest.shards]
        open_bytes = remote.cache_bytes() // 2 if in_order else sum(sizes)
        self._held = HeldBlocks(self._open, sizes, open_bytes, NUM_AHEAD)

    def __len__(self) -> int:
        return len(self._manifest.shards)

    def __getitem__(self, number: int) -> Shard:  # type: ignore[override]  # no slices
        """A shard, which is fetched if it is not there.

        Raises:
            ArtifactError: it cannot be fetched.
            CorruptFileError: what came is not what the manifest says.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        if not self._in_order:
            self.expect(range(number, min(number + NUM_AHEAD + 1, len(self))))
        shard: Shard = self._held[number]
        return shard

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    def expect(self, numbers: Sequence[int]) -> None:
        """Begin to fetch these."""
        for number in numbers:
            self._held.begin(number)

    def _open(self, number: int) -> Shard:
        entry = self._manifest.shards[number]
        path = self._folder / entry.file
        url = f"{self._url}/{entry.file}"
        remote.kept(
            path,
            lambda path: remote.fetch(url, path, entry.sha256),
            lambda path: _is_sound(path, entry),
        )
        return Shard(self._folder, self._manifest, entry)


def _read_manifest(url: str) -> bytes:
    file_system, path = remote.open_filesystem(url)
    where = f"{path.rstrip('/')}/{MANIFEST}"
    with remote.reaching(url):
        try:
            content: bytes = file_system.cat_file(where)
        except FileNotFoundError:
            raise ArtifactError(
                f"{url} is no latent set, or is not complete: it has no {MANIFEST}."
            ) from None
    return content


def _begin(folder: Path, url: str, manifest: bytes) -> None:
    """Fetch everything but the shards."""
    with files.write_folder(folder) as part:
        (part / MANIFEST).write_bytes(manifest)
        try:
            sha256 = read_manifest(part).tokenizer_sha256
        except LatentLMError as error:
            raise type(error)(str(error).replace(str(part), url)) from None
        inside = part / files.TOKENIZER_FOLDER
        inside.mkdir()
        place = f"{url}/{files.TOKENIZER_FOLDER}"
        remote.fetch(f"{place}/{files.WEIGHTS_FILE}", inside / files.WEIGHTS_FILE, sha256)
        config = remote.read_bytes(f"{place}/{files.CONFIG_FILE}")
        (inside / files.CONFIG_FILE).write_bytes(config)
        files.write_json(part / REMOTE, Remote(url=url).to_dict())


def _is_sound(path: Path, entry: ShardEntry) -> bool:
    return path.stat().st_size == entry.num_bytes and files.sha256_file(path) == entry.sha256
