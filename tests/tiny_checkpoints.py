"""Checkpoints of tensors that several processes share out, for the tests of them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from latentlm_core.artifacts import save_tokenizer
from latentlm_core.export_config import TokenizerExport
from latentlm_core.files import whole_tensors, write_safetensors
from latentlm_core.processes import current
from latentlm_core.runtime import generator
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.checkpoint_files import Piece, ShareFile, copy_strictly
from latentlm_core.training.checkpoint_state import CheckpointState
from latentlm_core.training.parallel import shard
from tests.tiny_parallel import make_trainer, make_vit, whole

SHARED = ("even", "uneven", "few", "half", "columns", "empty")
"""Of the tensors below, those that are shared out."""


def values() -> dict[str, Tensor]:
    rng = generator("values")
    return {
        "even": torch.randn(8, 3, generator=rng),
        "uneven": torch.randn(5, 2, 2, generator=rng),
        "few": torch.randn(1, 4, generator=rng),
        "half": torch.randn(7, generator=rng).bfloat16(),
        "columns": torch.randn(3, 6, generator=rng),
        "empty": torch.empty(0, 2),
        "whole": torch.arange(6).view(2, 3),
        "step": torch.tensor(5.0),
    }


def mesh_of(copies: int) -> DeviceMesh | None:
    """All processes, as so many copies of what is shared out among the others."""
    size = current().size
    if size == 1:
        return None
    shape = (size,) if copies == 1 else (copies, size // copies)
    return init_device_mesh("cpu", shape)


def share(tensors: dict[str, Tensor], copies: int = 1) -> dict[str, Tensor]:
    mesh = mesh_of(copies)
    if mesh is None:
        return tensors
    shared = dict(tensors)
    for name in SHARED:
        placement = Shard(1 if name == "columns" else 0)
        placements = [placement] if mesh.ndim == 1 else [Replicate(), placement]
        shared[name] = distribute_tensor(tensors[name], mesh, placements)
    return shared


def save(folder: Path, step: int = 1, copies: int = 1, is_async: bool = False) -> None:
    """Save; with ``is_async`` all tensors change as soon as that is under way."""
    tensors = share(values(), copies)
    with CheckpointStore(folder, keep=2, is_async=is_async) as store:
        state = CheckpointState(step=step, samples_seen=8, seconds=0.1, config={})
        store.save(state, {"model": tensors, "figures": {"loss": torch.tensor(1.5)}})
        for tensor in tensors.values():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.zero_()


def restore(folder: Path, copies: int = 1) -> dict[str, Tensor]:
    """Read the newest checkpoint into tensors that are shared out; gathered."""
    targets = share({name: torch.zeros_like(value) for name, value in values().items()}, copies)
    checkpoint = CheckpointStore(folder, keep=2).latest()
    assert checkpoint is not None
    with checkpoint.open("model") as stored:
        copy_strictly(targets, stored, "model")
    assert checkpoint.read("figures") == {"loss": torch.tensor(1.5)}
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in targets.items()
    }


def export(path: Path, copies: int) -> None:
    """What a workflow does at the end of a run: the main process writes, all gather."""
    tensors = share(values(), copies)
    if dist.get_rank() == 0:
        write_safetensors(path, tensors, {"format": "pt"})
    else:
        assert len(list(whole_tensors(tensors))) == len(tensors)


def export_tokenizer(folder: Path) -> None:
    """The same with a whole network, through the function that workflows call."""
    task, _ = make_vit()
    mesh = mesh_of(1)
    if mesh is not None:
        shard(task.vae, mesh, torch.float32)
    save_tokenizer(folder, task.vae, TokenizerExport(tokenizer=task.vae.config))


def save_with_a_full_disk(folder: Path, rank: int) -> str:
    """Save where one process has no space; what each process says of it."""
    write = ShareFile.write

    def refuse(self: ShareFile, part: Path) -> None:
        write_safetensors(part / ("x" * 300), {})

    if current().rank == rank:
        ShareFile.write = refuse  # type: ignore[method-assign]
    try:
        save(folder, 2)
    except Exception as error:
        return str(error)
    finally:
        ShareFile.write = write  # type: ignore[method-assign]
    return "saved"


def look(folder: Path) -> str:
    try:
        restore(folder)
    except Exception as error:
        return str(error)
    return "sound"


def read_sizes(folder: Path, name: str) -> list[int]:
    """How many numbers this process reads, each time, to restore a tensor that is shared out."""
    target = share(values())[name]
    checkpoint = CheckpointStore(folder, keep=2).latest()
    assert checkpoint is not None
    sizes, read = [], Piece.read

    def count(self: Piece, key: str, part: tuple[slice, ...]) -> Tensor:
        tensor = read(self, key, part)
        sizes.append(tensor.numel())
        return tensor

    Piece.read = count  # type: ignore[method-assign]
    try:
        with checkpoint.open("model") as stored:
            stored[name].copy_to(target)
    finally:
        Piece.read = read  # type: ignore[method-assign]
    return sizes


def train(folder: Path, kind: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Train to the end, where the trainer has the average for weights, and read it all back."""
    make_trainer(folder, kind, **settings).run()
    return resume(folder, kind, settings)


def resume(folder: Path, kind: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """All that a new trainer reads."""
    trainer = make_trainer(folder, kind, **settings)
    assert trainer._resume() == settings["total_steps"]
    return whole(trainer)
