"""The tensors of a checkpoint on disk: every process writes what it has, any number reads it.

    model.safetensors                 a part that each process has whole; the main one writes it
    model-00001-of-00004.safetensors  a part that is shared out (DTensors), a file of each process

Where a shard lies in its tensor stands in the metadata of its file.

Notable choices:
- torch's own writer of such files (torch.distributed.checkpoint.hf_storage) is not used: it plans
  each save with collectives that pickle, which must not run in a thread beside the training,
  chooses the names of its files and answers damage with assertions. Its reader understands ours,
  for the metadata are written in its form;
- of equal replicas (HSDP) the first writes;
- a tensor is read where it is wanted: each process copies the slices of its own shard and never
  holds a second copy of the model.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from operator import lt
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from latentlm_core.config import Config
from latentlm_core.errors import ArtifactError
from latentlm_core.files import write_safetensors
from latentlm_core.processes import Processes
from latentlm_core.training.checkpoint_state import damaged
from latentlm_core.training.parallel import local

PLACES_KEY = "DCP_SHARDING_INFO"
"""Of the metadata that hold the places of a file's shards: torch.distributed.checkpoint's."""

_Sizes = tuple[Annotated[int, Field(ge=0)], ...]
_SHARD = re.compile(r"(?P<part>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


class Place(Config):
    """Where a shard lies."""

    saved_offsets: _Sizes
    """Index of its first element in the whole tensor."""
    shape: _Sizes
    """Of the whole tensor."""

    def holds(self, shard: tuple[int, ...]) -> bool:
        """Whether a shard of this shape is inside the tensor."""
        return len(shard) == len(self.shape) == len(self.saved_offsets) and all(
            offset + size <= whole
            for offset, size, whole in zip(self.saved_offsets, shard, self.shape, strict=True)
        )


_PLACES = TypeAdapter(dict[str, Place])


@dataclass(frozen=True, slots=True)
class ShareFile:
    """What one process writes of one part.

    Attributes:
        name: of the file.
        tensors: the process's shards and, in the main process, what each process has whole.
        places: where they lie; none in a file that is the whole part.
    """

    name: str
    tensors: Mapping[str, Tensor]
    places: Mapping[str, Place]

    def write(self, folder: Path) -> None:
        """Write the file.

        Raises:
            ArtifactError: the file system refused.
        """
        metadata = {PLACES_KEY: _PLACES.dump_json(dict(self.places)).decode()}
        write_safetensors(folder / self.name, self.tensors, metadata if self.places else None)


@torch.no_grad()
def own_share(
    parts: Mapping[str, Mapping[str, Tensor]], processes: Processes, copy: bool
) -> list[ShareFile]:
    """The files that this process writes of a checkpoint.

    Args:
        parts: tensors by name, DTensors where they are shared out, by the name of their part.
        processes: all that hold the parts.
        copy: take copies on the CPU, so that training may go on while the files are written.
    """
    files = []
    for part, tensors in parts.items():
        own = {name: item for name, item in tensors.items() if _is_writer(item, processes)}
        shards = {name: local(tensor) for name, tensor in own.items()}
        if copy:
            shards = {name: shard.to("cpu", copy=True) for name, shard in shards.items()}
        if processes.size > 1 and any(isinstance(item, DTensor) for item in tensors.values()):
            number = f"-{processes.rank + 1:05d}-of-{processes.size:05d}"
            places = {
                name: Place(saved_offsets=_offsets(tensor), shape=tuple(tensor.shape))
                for name, tensor in own.items()
            }
            files.append(ShareFile(f"{part}{number}.safetensors", shards, places))
        elif processes.is_main:
            files.append(ShareFile(f"{part}.safetensors", shards, {}))
    return files


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard of a tensor in an opened file.

    Attributes:
        path: of the file.
        file: as the library opened it.
        begin: index of the shard's first element in the whole tensor.
        shape: of the shard.
    """

    path: Path
    file: Any
    begin: tuple[int, ...]
    shape: tuple[int, ...]

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """This part of the shard.

        Raises:
            CorruptFileError: the file does not hold it.
        """
        with _reading(self.path):
            if all(item == slice(0, size) for item, size in zip(part, self.shape, strict=True)):
                return self.file.get_tensor(name)  # type: ignore[no-any-return]
            return self.file.get_slice(name)[part]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an opened part, read when it is wanted.

    Attributes:
        name: in the files.
        shape: of the whole.
        pieces: that make it up.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def whole(self) -> Tensor:
        """The whole tensor, on the CPU."""
        piece = self.pieces[0]
        first = piece.read(self.name, tuple(slice(0, size) for size in piece.shape))
        if len(self.pieces) == 1:
            return first
        whole = first.new_empty(self.shape)
        self.copy_to(whole)
        return whole

    @torch.no_grad()
    def copy_to(self, target: Tensor) -> None:
        """Overwrite a tensor of this shape; of a DTensor, the shard of this process."""
        own, offsets = local(target), _offsets(target)
        for piece in self.pieces:
            begin = list(map(max, offsets, piece.begin))
            end = [
                min(there + size, here + own_size)
                for there, size, here, own_size in zip(
                    piece.begin, piece.shape, offsets, own.shape, strict=True
                )
            ]
            if all(map(lt, begin, end)):
                shard = piece.read(self.name, _slices(begin, end, piece.begin))
                own[_slices(begin, end, offsets)].copy_(shard)


@contextmanager
def open_part(folder: Path, part: str, files: Collection[str]) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a part, to be read inside the block.

    Args:
        folder: of the checkpoint.
        part: name of the part.
        files: names of the checkpoint's files.

    Raises:
        ArtifactError: a file is not there.
        CorruptFileError: a file is damaged, or the shards do not make up their tensors.
    """
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        pieces: dict[str, list[Piece]] = {}
        for name in files_of(part, folder, files):
            path = folder / name
            with _reading(path):
                file = stack.enter_context(safetensors.safe_open(path, "pt"))
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                found = _places(file.metadata(), shapes, path)
            for key, place in found.items():
                first = places.setdefault(key, place)
                if not place.holds(shapes[key]) or place.shape != first.shape:
                    raise damaged(path, f"{key} does not lie inside its tensor")
                piece = Piece(path, file, place.saved_offsets, shapes[key])
                pieces.setdefault(key, []).append(piece)
        for key, parts in pieces.items():
            if sum(prod(piece.shape) for piece in parts) != prod(places[key].shape):
                raise damaged(folder / f"{part}.safetensors", f"{key} is not whole")
        yield {key: StoredTensor(key, places[key].shape, tuple(pieces[key])) for key in pieces}


Source = Tensor | StoredTensor


def copy_strictly(target: Mapping[str, Tensor], source: Mapping[str, Source], where: str) -> None:
    """Copy ``source`` into the tensors of ``target``.

    Args:
        target: tensors by name, of a module's ``state_dict`` for instance; overwritten.
        source: as many tensors of the same names and shapes, or those of an opened checkpoint.
        where: what the source is, for the message.

    Raises:
        ArtifactError: names or shapes differ, naming every difference; nothing is copied.
    """
    problems = [
        *(f"{name} is missing" for name in sorted(target.keys() - source.keys())),
        *(f"{name} is unknown" for name in sorted(source.keys() - target.keys())),
        *(
            f"{name} is {tuple(source[name].shape)} and should be {tuple(tensor.shape)}"
            for name, tensor in target.items()
            if name in source and tuple(source[name].shape) != tuple(tensor.shape)
        ),
    ]
    if problems:
        raise ArtifactError(f"{where} does not fit: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, tensor in target.items():
            item = source[name]
            if isinstance(item, StoredTensor):
                item.copy_to(tensor)
            else:
                tensor.copy_(item)


def files_of(part: str, folder: Path, files: Collection[str]) -> list[str]:
    """Of the files of a checkpoint, those of a part.

    Raises:
        CorruptFileError: one of them is not there.
    """
    found = [match for name in files if (match := _SHARD.fullmatch(name))]
    totals = {match["total"] for match in found if match["part"] == part}
    wanted = [
        f"{part}-{number:05d}-of-{total}.safetensors"
        for total in totals
        for number in range(1, int(total) + 1)
    ]
    for name in wanted:
        if name not in files:
            raise damaged(folder / name, "it is missing")
    return wanted or [f"{part}.safetensors"]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of what a file does not yield that the file is damaged."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from None


def _places(
    metadata: Mapping[str, str] | None, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Place]:
    """Where the tensors of a file lie, which are whole where its metadata say nothing."""
    text = (metadata or {}).get(PLACES_KEY)
    if text is None:
        return {
            name: Place(saved_offsets=(0,) * len(shape), shape=shape)
            for name, shape in shapes.items()
        }
    try:
        places = _PLACES.validate_json(text)
    except ValidationError:
        raise damaged(path, f"its {PLACES_KEY} does not say where its shards lie") from None
    if places.keys() != shapes.keys():
        raise damaged(path, f"its {PLACES_KEY} is about other tensors than it holds")
    return places


def _is_writer(tensor: Tensor, processes: Processes) -> bool:
    """Whether this process writes what it has of a tensor: the first of those that have it."""
    if not isinstance(tensor, DTensor) or tensor.numel() == 0:
        return processes.is_main
    coordinate = tensor.device_mesh.get_coordinate()
    return tensor.to_local().numel() > 0 and not any(
        index
        for index, placement in zip(coordinate or (), tensor.placements, strict=True)
        if placement.is_replicate()
    )


def _offsets(tensor: Tensor) -> tuple[int, ...]:
    """Where it begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple(compute_local_shape_and_global_offset(tensor.shape, mesh, placements)[1])


def _slices(begin: list[int], end: list[int], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, origin, strict=True))
