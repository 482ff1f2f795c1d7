"""Targets that hold tensors: safetensors, shards and manifests, exports, checkpoints, npz."""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from latentlm_core import files
from latentlm_core.data.caching import encode_source
from latentlm_core.data.shards import LatentSet
from latentlm_core.evaluation.npz import (
    npz_keys,
    npz_member,
    read_exactly,
    read_floats,
    read_record,
)
from latentlm_core.evaluation.statistics import load_statistics
from latentlm_core.tokenizers.base import PosteriorKind
from latentlm_core.weight_files import INDEX_FILE, WeightFiles
from tests.hostile import Target, in_turn
from tests.hostile_changes import (
    changed_bytes,
    changed_json,
    changed_json_bytes,
    names,
    odd_json,
    sealed,
)
from tests.tiny_latents import Holed, export_tokenizer

SOUND = save(
    {
        "a.weight": torch.arange(12.0).view(3, 4),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": torch.zeros(0, 3),
    },
    {"format": "pt"},
)
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", ""]


@st.composite
def changed_tensors(draw: st.DrawFn, sound: bytes) -> bytes:
    """A safetensors file whose header tells lies, or whose bytes are damaged."""
    length = int.from_bytes(sound[:8], "little")
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(sound, region=length))
    header, data = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    tensors = [name for name in header if name != "__metadata__"]
    if tensors and draw(st.booleans()):
        name = draw(st.sampled_from(tensors))
        size = draw(st.sampled_from([0, 1, 8, 2**20, 2**40, 2**62, len(data)]))
        shape = draw(
            st.sampled_from([[size], [size, size], [0, size], [], [size // 4], [1] * 2000])
        )
        start = draw(st.sampled_from([0, header[name]["data_offsets"][0], size]))
        entry = {"dtype": draw(st.sampled_from(DTYPES)), "shape": shape}
        header[name] = entry | {"data_offsets": [start, start + size]}
    else:
        header = draw(changed_json(header))
    text = json.dumps(header).encode("utf-8", "replace")
    told = draw(st.sampled_from([len(text)] * 6 + [0, len(text) - 1, 10**8, 2**63, 2**64 - 1]))
    return struct.pack("<Q", told) + text + draw(st.sampled_from([data, data, data[:-1], b""]))


def use_tensors(_made: None, case: tuple[bytes, bytes | None], folder: Path) -> None:
    """One file, or a shard with an index; the first fault must not hide one of the other reader."""
    content, index = case
    path = folder / ("model.safetensors" if index is None else "model-1.safetensors")
    path.write_bytes(content)
    if index is not None:
        (folder / INDEX_FILE).write_bytes(index)
    try:
        weights = WeightFiles.in_folder(folder)
        weights.shapes(weights.places)
        for _ in weights.tensors(weights.places):
            pass
    finally:
        files.read_safetensors(path)


INDEX = {
    "metadata": {},
    "weight_map": {"a.weight": "model-1.safetensors", "b": "model-1.safetensors"},
}
TENSORS = Target(
    "safetensors",
    lambda folder: None,
    lambda made: (SOUND, None),
    lambda made: st.tuples(changed_tensors(SOUND), st.none() | changed_json_bytes(INDEX)),
    use_tensors,
)


def make_latents(folder: Path) -> Path:
    """A set of 20 examples in two shards."""
    tokenizer, export = export_tokenizer(PosteriorKind.LEARNED, folder / "export")
    options = {"spec": "holed", "split": "train", "shard_size": 12, "tokenizer_export": export}
    encode_source(Holed(broken=[2], count=20), tokenizer, folder / "set", **options)
    return folder / "set"


def read_all(folder: Path) -> None:
    """Everything that a run reads of a set whose hashes are not compared."""
    latents = LatentSet.open(folder, verify=False)
    latents.manifest.stats(latents.posterior)
    for index in range(min(len(latents), 100)):
        latents.read_one(index)
    if not latents.is_ragged:
        latents.read(range(min(len(latents), 100)))


def use_shard(made: Path, content: bytes, folder: Path) -> None:
    """The forger fixes the manifest too."""
    shutil.copytree(made, folder / "set")
    path = folder / "set" / "shard-00000.safetensors"
    path.write_bytes(content)
    manifest = files.read_sealed_json(folder / "set" / "manifest.json")
    manifest["shards"][0] |= {"num_bytes": len(content), "sha256": files.sha256_file(path)}
    files.write_sealed_json(folder / "set" / "manifest.json", manifest)
    read_all(folder / "set")


SHARDS = Target(
    "shards",
    make_latents,
    lambda made: (made / "shard-00000.safetensors").read_bytes(),
    lambda made: changed_tensors((made / "shard-00000.safetensors").read_bytes()),
    use_shard,
)


def cases_of_manifests(made: Path) -> st.SearchStrategy[bytes]:
    """Files of the manifest, with and without a seal that vouches for it."""
    value = files.read_sealed_json(made / "manifest.json")
    return changed_json(value).map(sealed) | changed_json_bytes(value)


def use_manifest(made: Path, content: bytes, folder: Path) -> None:
    """A set in which only the manifest is changed."""
    shutil.copytree(made, folder / "set")
    (folder / "set" / "manifest.json").write_bytes(content)
    read_all(folder / "set")


MANIFESTS = Target(
    "manifests",
    make_latents,
    lambda made: (made / "manifest.json").read_bytes(),
    cases_of_manifests,
    use_manifest,
)


def make_npz(folder: Path) -> bytes:
    """Statistics with their protocol."""
    buffer = io.BytesIO()
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "protocol": np.array('{"a": 1}')}
    np.savez_compressed(buffer, **arrays, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    return buffer.getvalue()


@st.composite
def changed_npz(draw: st.DrawFn, sound: bytes) -> bytes:
    """An archive with a member whose header lies, or with damaged bytes."""
    if draw(st.booleans()):
        return draw(changed_bytes(sound))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw(st.sampled_from([0, zipfile.ZIP_DEFLATED]))) as archive:
        for name in draw(
            st.lists(st.sampled_from(["mu", "sigma", "protocol", "arr_0"]), unique=True)
        ):
            archive.writestr(f"{name}.npy", draw(npy()))
        if draw(st.booleans()):
            archive.writestr(draw(names.filter(lambda name: name.isprintable() and name)), b"x")
    content = buffer.getvalue()
    return draw(changed_bytes(content)) if draw(st.booleans()) else content


@st.composite
def npy(draw: st.DrawFn) -> bytes:
    """A file of an array: of some header and some bytes."""
    kinds = [
        "<f8",
        "<f4",
        "|u1",
        "<U8",
        "<U2000000",
        "|O",
        "|S3",
        "<M8[s]",
        "V0",
        "<U0",
        "[('a','f4')]",
    ]
    side = st.sampled_from([0, 1, 3, 4, -1, 2**20, 2**40, 2**63, 10**30])
    shape = tuple(draw(st.lists(side, max_size=4)))
    dtype = draw(st.sampled_from(kinds))
    described = dtype if dtype.startswith("[") else repr(dtype)
    text = f"{{'descr': {described}, 'fortran_order': {draw(st.booleans())}, 'shape': {shape}, }}"
    text = draw(st.sampled_from([text] * 8 + ["", "{", text * 100, "__import__('os')", "(" * 5000]))
    encoded = text.encode()
    version = draw(st.sampled_from([b"\x01\x00"] * 5 + [b"\x02\x00", b"\x03\x00", b"\x09\x00"]))
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(encoded) % 2**16)
    return b"\x93NUMPY" + version + length + encoded + draw(st.binary(max_size=300))


def use_npz(_made: bytes, content: bytes, folder: Path) -> None:
    """All the readers, each of which refuses on its own."""
    path = folder / "a.npz"
    path.write_bytes(content)
    readers = [
        lambda: load_statistics(path),
        lambda: read_record(path, "protocol"),
        lambda: read_floats(path, "mu", (3,)),
        lambda: open_all(path),
    ]
    in_turn(readers)


def open_all(path: Path) -> None:
    """The header of every member, and a little of what follows."""
    for key in npz_keys(path):
        with npz_member(path, key) as member:
            read_exactly(member.stream, min(member.dtype.itemsize, 1 << 20), key)


NPZ = Target("npz", make_npz, lambda made: made, lambda made: changed_npz(made) | odd_json, use_npz)
