"""How several processes train one model: who computes what, and how their gradients become sums.

    ddp     each process holds all weights; gradients are summed while they are computed
    fsdp    weights, gradients, optimizer and average are shared out (FSDP2, ``fully_shard``), block
            by block: a block is gathered where it is needed and let go again

Notable choices:
- a step has the same batches, examples and random numbers for any number of processes
  (``StepShare``), and its gradient is the sum over all of them: objectives are divided by counts of
  the whole step, so DDP's average is replaced by a sum and FSDP2's divisor is 1;
- DDP wants to see a forward pass only to know that a backward pass follows. Losses call encoders,
  decoders and heads as they like, so what DDP wraps is the objective that they end in;
- FSDP2 gathers in the forward pass of a module, and a module without one of its own (a tokenizer,
  whose ``encode`` and ``decode`` are called) is shared out child by child;
- parameters keep their names; on a GPU bfloat16 weights travel as such, and gradients are summed in
  float32.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentlm_core.draws import WHOLE, Share
from latentlm_core.errors import ConfigError
from latentlm_core.processes import ALONE, Processes
from latentlm_core.training.hardware import blocks_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Parallel = Literal["ddp", "fsdp"]

Backward = Callable[[Tensor, bool], None]
"""(objective, is_last): add its gradients; the last of a step makes them sums over processes."""


@dataclass(frozen=True, slots=True)
class StepShare:
    """What one process takes of the A batches of each step.

    Attributes:
        accumulate: A.
        indices: of its batches among the A.
        rows: its share of the rows of each of them.
    """

    accumulate: int
    indices: range
    rows: Share = WHOLE

    @classmethod
    def of(cls, accumulate: int, processes: Processes = ALONE) -> "StepShare":
        """Whole batches where there are enough of them, else rows of one.

        Raises:
            ConfigError: neither number is a multiple of the other.
        """
        rank, size = processes.rank, processes.size
        if accumulate % size == 0:
            return cls(accumulate, range(rank, accumulate, size))
        if size % accumulate:
            allowed = ", ".join(str(n) for n in range(1, size) if size % n == 0)
            raise ConfigError(
                f"{size} processes cannot share the trainer.accumulate = {accumulate} batches of a "
                "step: one must be a multiple of the other.",
                hint=f"Set trainer.accumulate to {allowed} or a multiple of {size}.",
            )
        index, sharer = divmod(rank, size // accumulate)
        return cls(accumulate, range(index, index + 1), (sharer, size // accumulate))

    def numbers(self, step: int) -> Iterator[int]:
        """Numbers of its batches in the run, from those of ``step`` on, without end."""
        return (s * self.accumulate + index for s in count(step) for index in self.indices)


def mesh_of(
    parallel: Parallel, shard_size: int, device: torch.device, processes: Processes
) -> "DeviceMesh | None":
    """The processes that share one copy of the weights (S), or copies (W / S) x shares (S).

    Args:
        parallel: how processes share a model.
        shard_size: S; 0 is all processes.
        device: where weights are.
        processes: W.

    Returns:
        None where each process holds all weights.

    Raises:
        ConfigError: S does not divide W.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = processes.size
    if size == 1 or parallel == "ddp":
        return None
    if shard_size in (0, size):
        return init_device_mesh(device.type, (size,))
    if size % shard_size:
        raise ConfigError(
            f"trainer.shard_size = {shard_size} does not divide the {size} processes.",
            hint="Set it to 0 to share each weight out over all of them.",
        )
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (size // shard_size, shard_size), mesh_dim_names=names)


def gathered_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """In which dtype weights travel where autocast's is ``dtype``; None: in their own."""
    return dtype if device.type == "cuda" and dtype != torch.float32 else None


def shard(module: nn.Module, mesh: "DeviceMesh", gathered: torch.dtype | None) -> None:
    """Share the weights of a network out over a mesh, in place, block by block.

    They move to the mesh's device one block after the other, and travel as ``gathered``.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Nothing here writes into the output of a block, which is what torch warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    policy = MixedPrecisionPolicy(
        param_dtype=gathered,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other memory format
    for root in _roots(module):
        for part in (*blocks_of(root), root):
            sharded = fully_shard(part, mesh=mesh, mp_policy=policy)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)


def reshard(module: nn.Module) -> None:
    """Let go of gathered weights, which do not know of changes to the shares behind them."""
    for part in _sharded_parts(module):
        part.reshard()


def backward_of(
    module: nn.Module, processes: Processes, reduce_each_batch: bool = False
) -> Backward:
    """How the gradients of a module are computed, and summed over processes.

    Args:
        module: after ``shard``, where it is shared out.
        processes: W.
        reduce_each_batch: share gradients out after each batch, not after the last one of a step
            (of a module that is shared out).
    """
    if processes.size == 1:
        return lambda objective, is_last: objective.backward()  # type: ignore[no-untyped-call]
    if next(_sharded_parts(module), None) is not None:
        return _sharded_backward(module, reduce_each_batch)
    return _replicated_backward(module)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is shared out, in its own memory; else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _sharded_backward(module: nn.Module, reduce_each_batch: bool) -> Backward:
    def backward(objective: Tensor, is_last: bool) -> None:
        for part in _sharded_parts(module):
            part.set_requires_gradient_sync(is_last or reduce_each_batch)
            part.set_requires_all_reduce(is_last)  # among copies of the shares, once a step
        objective.backward()  # type: ignore[no-untyped-call]

    return backward


def _replicated_backward(module: nn.Module) -> Backward:
    # Of a tensor of one row, strides mean nothing, and DDP copies it all the same.
    warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
    replica = DistributedDataParallel(_Objective(module), gradient_as_bucket_view=True)
    replica.register_comm_hook(None, _sum)

    def backward(objective: Tensor, is_last: bool) -> None:
        with nullcontext() if is_last else replica.no_sync():
            replica(objective).backward()

    return backward


class _Objective(nn.Module):
    """What DDP wraps: the parameters whose gradients it sums, and what they are gradients of."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trained = nn.ParameterList(module.parameters())

    def forward(self, objective: Tensor) -> Tensor:
        return objective


def _sum(
    _: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _roots(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have a forward pass."""
    if type(module).forward is not nn.Module.forward:
        yield module
        return
    for child in module.children():
        yield from _roots(child)


def _sharded_parts(module: nn.Module) -> Iterator[Any]:
    """Every part of a network that is gathered as one."""
    return (part for part in module.modules() if hasattr(part, "reshard"))
