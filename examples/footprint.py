"""What an optimizer step takes of one of several processes, counted or predicted.

A whole step (forward, backward, clipping, AdamW, average), made of the trainer's own parts, runs
under a meter of storages and collectives: with data, in real processes, or without, as rank 0 of a
group whose others are imaginary. Padding, gathered blocks and what passes by in between count; the
batch itself, figures that are logged, and what happens inside single operations do not.

DDP cannot run without data. What it does with gradients is done in its place: they lie in buckets,
which are there from the start and are summed once a step.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentlm_core.artifacts import build_generator
from latentlm_core.data.packing import SequenceBatch
from latentlm_core.layout import SequenceLayout
from latentlm_core.processes import ALONE, Processes
from latentlm_core.recipes import lm_recipe
from latentlm_core.runtime import generator
from latentlm_core.training.hardware import autocast, recompute_blocks
from latentlm_core.training.lm_task import LMTask
from latentlm_core.training.optim import Ema, build_optimizer
from latentlm_core.training.parallel import Parallel, backward_of, local, mesh_of, shard

CPU, HALF = torch.device("cpu"), torch.bfloat16
CHANNELS, VOCABULARY = 16, 1001
"""Of ImageNet's latents, and its classes with the null class."""
MACHINE = 8
"""GPUs of a machine."""
COLLECTIVES = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
}
"""What torch calls them: what they are, and which argument is the whole."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a recipe is run.

    Attributes:
        recipe: its name.
        processes: W.
        parallel: ddp or fsdp.
        shard_size: processes that share one copy of the weights; 0 is all.
        recompute: whether blocks are computed twice.
        rows: sequences that a process computes at once.
        batches: how many times it does so in a step.
        reduce_each_batch: whether gradients are summed each time, not once a step.
        grid: latents of an image.
    """

    recipe: str
    processes: int
    parallel: Parallel
    shard_size: int = 0
    recompute: bool = False
    rows: int = 32
    batches: int = 1
    reduce_each_batch: bool = False
    grid: tuple[int, int] = (16, 16)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes in the process of rank 0, whose shares are the largest.

    Attributes:
        weights: float32, as are all that last.
        moments: of AdamW.
        average: of the weights.
        gradients: when the backward pass of the last batch has ended.
        kept: what the forward pass of the last batch leaves for its backward pass.
        peak: the most at one time in a step, everything included.
        traffic: of a step: ``sent`` by this process in rings, ``leaving`` its machine from all GPUs
            that are there, and how many collectives there are of each kind.
    """

    weights: int
    moments: int
    average: int
    gradients: int
    kept: int
    peak: int
    traffic: dict[str, int]


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and what collectives send.

    Args:
        mode: in which tensors have no data; None where they have. Tensors that torch makes without
            data in passing, to find out shapes, do not count where others have.
    """

    def __init__(self, mode: FakeTensorMode | None) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.traffic: Counter[str] = Counter()
        self._mode = mode
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Look at what an operation made; of a DTensor, at what is done with its own share."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        made = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._note(func.name(), args)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and getattr(tensor, "fake_mode", None) is self._mode:
                self._watch(tensor.untyped_storage())
        return made

    def __enter__(self) -> "Meter":
        self._resize = torch.UntypedStorage.resize_
        meter = self

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            meter._resize(storage, size)
            if id(storage) in meter._sizes:
                meter._add(size - meter._sizes[id(storage)])
                meter._sizes[id(storage)] = size

        torch.UntypedStorage.resize_ = resize  # by which FSDP2 lets go of gathered blocks
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def restart(self) -> None:
        """Forget the peak and the traffic so far."""
        gc.collect()
        self.peak = self.bytes
        self.traffic.clear()

    def communicate(self, kind: str, num_bytes: int, ranks: Sequence[int]) -> None:
        """Count a collective among ``ranks``, of which this process is one.

        Args:
            kind: of ``COLLECTIVES``.
            num_bytes: of the whole: what is gathered, scattered, or summed. It goes round a ring
                once, in a sum twice, but for the part that each has at the start.
            ranks: W of them. Where they are on several machines, each machine sends on what one of
                its processes sends, for each of the groups like this one that it takes part in.
        """
        sent = num_bytes * (len(ranks) - 1) // len(ranks) * (2 if kind == "all_reduce" else 1)
        here = sum(rank < MACHINE for rank in ranks)
        groups = MACHINE // here if here < len(ranks) else 0
        self.traffic.update({kind: 1, "sent": sent, "leaving": groups * sent})

    def _note(self, name: str, args: Sequence[Any]) -> None:
        kind, whole = COLLECTIVES.get(name, (name, 0))
        group = next(value for value in args if isinstance(value, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        self.communicate(kind, sum(tensor.nbytes for tensor in tree_leaves(args[whole])), ranks)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._add(storage.nbytes())
            self._alive[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        self._add(-self._sizes.pop(key))
        del self._alive[key]

    def _add(self, amount: int) -> None:
        self.bytes += amount
        self.peak = max(self.peak, self.bytes)


def predict(plan: Plan) -> Footprint:
    """What a step of ``plan`` would take."""
    with _imaginary(plan.processes) as processes:
        return measure(plan, processes, is_real=False)


def measure(plan: Plan, processes: Processes, is_real: bool) -> Footprint:
    """What a step of ``plan`` takes of this process, with data or without."""
    recipe = lm_recipe(plan.recipe)
    mesh = mesh_of(plan.parallel, plan.shard_size, CPU, processes)
    is_bucketed = mesh is None and not is_real and processes.size > 1
    batch = _batch(plan)
    without_data = nullcontext() if is_real else FakeTensorMode(allow_non_fake_inputs=True)
    with without_data as mode, Meter(mode) as meter:
        model = build_generator(recipe.model.complete(plan.grid, CHANNELS, VOCABULARY))
        if plan.recompute:
            recompute_blocks(model)
        if mesh is not None:
            shard(model, mesh, HALF)
        weights = list(model.parameters())
        buckets = [torch.empty_like(weight) for weight in weights] if is_bucketed else []
        backward = backward_of(model, ALONE if is_bucketed else processes, plan.reduce_each_batch)
        optimizer = build_optimizer(model, recipe.optimizer)
        optimizer.found_inf = torch.zeros(())
        average = Ema(model, recipe.trainer.ema_decay)
        task = LMTask(model, recipe.loss)

        def update() -> None:
            clip_grad_norm_(weights, recipe.optimizer.clip_norm)
            optimizer.step()
            average.update(0)

        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        update()  # makes the moments
        optimizer.zero_grad()
        meter.restart()
        for index in range(min(plan.batches, 2)):
            is_last = index == plan.batches - 1 or index == 1
            gc.collect()
            before = meter.bytes
            objective = _objective(task, batch)
            kept = meter.bytes - before
            if is_last:
                _fill(buckets, weights)
            backward(objective, is_last)
            del objective
            if not is_last:
                of_others = Counter(meter.traffic)
        for _ in range(plan.batches - 2):
            meter.traffic.update(of_others)
        if is_bucketed:
            meter.communicate("all_reduce", _bytes(buckets), range(processes.size))
        gradients = _bytes(weight.grad for weight in weights)
        update()
        states = optimizer.state.values()
        return Footprint(
            weights=_bytes(weights),
            moments=_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")),
            average=_bytes(average.tensors().values()),
            gradients=gradients,
            kept=kept,
            peak=meter.peak,
            traffic=dict(meter.traffic),
        )


@contextmanager
def _imaginary(size: int) -> Iterator[Processes]:
    """Inside the block this is rank 0 of ``size`` processes, and there are no others."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield Processes(0, size, 0, min(size, MACHINE))
    finally:
        dist.destroy_process_group()


def _batch(plan: Plan) -> SequenceBatch:
    """Class-conditional images in all but their content."""
    rows, length = plan.rows, plan.grid[0] * plan.grid[1]
    return SequenceBatch(
        ids=torch.zeros(rows, length + 1, dtype=torch.int64),
        latents=torch.zeros(rows, length + 1, CHANNELS),
        layout=SequenceLayout.of_images(rows, length),
        keys=("",) * rows,
    )


def _objective(task: LMTask, batch: SequenceBatch) -> Tensor:
    """The loss of a batch, as ``Stepper`` computes it."""
    (turn,) = task.turns(0)
    with autocast(HALF, CPU):
        loss = turn.loss(batch, generator("scaling"))["latent"]
    return turn.weights["latent"] * loss.total.float() / loss.count


def _fill(buckets: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Let the next backward pass move each gradient into its bucket, as DDP's last one does."""
    for weight, bucket in zip(weights, buckets, strict=False):

        def move(weight: Tensor, bucket: Tensor = bucket) -> None:
            weight.grad = bucket.copy_(weight.grad)

        weight.register_post_accumulate_grad_hook(move)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {id(storage): storage for storage in (local(t).untyped_storage() for t in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def tiny_plans(processes: int) -> list[Plan]:
    """Each way of sharing a model, a small one, for an even number of processes."""
    tiny = partial(Plan, "tiny", processes, rows=4, grid=(4, 4))
    return [
        tiny("ddp", recompute=True, batches=3),
        tiny("fsdp"),
        tiny("fsdp", recompute=True, batches=3),
        tiny("fsdp", shard_size=processes // 2, batches=3),
        tiny("fsdp", batches=3, reduce_each_batch=True),
    ]
