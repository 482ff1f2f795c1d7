"""How much memory a tokenizer's training takes once its discriminator joins, told before step 0.

A discriminator that starts at step 20,000 should not be what ends a run there. The forecast adds
up, for the generator's turn without and for both turns with the discriminator,

    weights, their gradients and AdamW's two moments;
    weights of LPIPS, which have neither;
    what the forward pass keeps for the backward pass, the greater of the two turns.

The last is measured, by watching what autograd saves for one and for two examples, and is linear
in the batch from there. Not counted: the weights' average (EMA), temporaries of single operations
and convolution workspaces. It is so a lower bound; the profiler saw a step's peak on a CPU 2 to
3 % above it, with and without the discriminator (small convolutional and ViT pairs).
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from latentlm_core.data.stream import MediaBatch
from latentlm_core.runtime import generator
from latentlm_core.training.hardware import autocast
from latentlm_core.training.speech_task import SpeechVAETask
from latentlm_core.training.tasks import Turn
from latentlm_core.training.vae_task import VAETask

AnyVAETask = VAETask | SpeechVAETask

TRAINED_COPIES = 4
"""A trained weight, its gradient and AdamW's two moments."""


@dataclass(frozen=True, slots=True)
class GanMemory:
    """A forecast of training memory, in bytes.

    Attributes:
        without_gan: before the discriminator's first step.
        with_gan: from then on; equal to ``without_gan`` where there is no discriminator.
    """

    without_gan: int
    with_gan: int


def forecast_gan_memory(task: AnyVAETask, batch: MediaBatch, dtype: torch.dtype) -> GanMemory:
    """Forecast the memory of a training step without and with the discriminator.

    Runs the forward passes of one and of two examples; no weight, gradient or generator of the
    run is touched.

    Args:
        task: on the device of the training.
        batch: one batch as the accelerator sees it at once (before accumulation).
        dtype: of the training's autocast; float32 is none.
    """
    frozen = sum(map(_bytes, _frozen(task)))
    critic = TRAINED_COPIES * _bytes(task.critic) if task.critic is not None else 0
    always = TRAINED_COPIES * _bytes(task.vae) + frozen
    with autocast(dtype, batch.media.device):
        before = _activations(task, task.turns(-1), batch)
        after = _activations(task, task.turns(task.config.gan_start_step), batch)
    return GanMemory(always + before, always + critic + after)


def _activations(task: AnyVAETask, turns: Sequence[Turn], batch: MediaBatch) -> int:
    """Bytes kept for the backward pass of the turn that keeps most."""
    return max(_extrapolate(task, turn, batch) for turn in turns)


def _extrapolate(task: AnyVAETask, turn: Turn, batch: MediaBatch) -> int:
    one, two = (_saved(task, turn, _first(batch, count)) for count in (1, 2))
    return one + (two - one) * (len(batch.media) - 1)


def _first(batch: MediaBatch, count: int) -> MediaBatch:
    """The first example, ``count`` times."""
    first = batch.media[:1]
    media = first.repeat(count, *(1,) * (first.ndim - 1))
    return MediaBatch(media, batch.labels[:1].repeat(count), ("",) * count)


def _frozen(task: AnyVAETask) -> list[nn.Module]:
    """Networks that are used and not trained."""
    return [task.perceptual] if isinstance(task, VAETask) and task.perceptual else []


def _saved(task: AnyVAETask, turn: Turn, batch: MediaBatch) -> int:
    """Most bytes that autograd keeps for ``turn`` at one time, weights left out."""
    networks = [*task.modules.values(), *_frozen(task)]
    meter = _Meter({_address(p) for network in networks for p in network.parameters()})
    randomness = generator("forecast", device=batch.media.device)
    with torch.enable_grad(), saved_tensors_hooks(meter.keep, lambda kept: kept.tensor):
        turn.loss(batch, randomness)
    return meter.peak


class _Meter:
    """Bytes of the distinct storages that are kept for a backward pass, now and at most."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.users: Counter[int] = Counter()
        self.bytes = 0
        self.peak = 0

    def keep(self, tensor: Tensor) -> "_Kept":
        kept = _Kept(tensor)
        address = _address(tensor)
        if address not in self.ignored:
            size = tensor.untyped_storage().nbytes()
            self.use(address, size)
            weakref.finalize(kept, self.free, address, size)
        return kept

    def use(self, address: int, size: int) -> None:
        self.users[address] += 1
        if self.users[address] == 1:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def free(self, address: int, size: int) -> None:
        self.users[address] -= 1
        if self.users[address] == 0:
            self.bytes -= size


@dataclass(frozen=True, eq=False)
class _Kept:
    """What autograd holds in place of a tensor; it ends when autograd lets go."""

    tensor: Tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(network: nn.Module) -> int:
    return sum(weight.nbytes for weight in network.parameters())
