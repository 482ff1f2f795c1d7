"""The machine, and the rule that one seed decides everything.

Randomness comes from the run's seed and the name of what is drawn: each draw has a generator of its
own, so resuming needs no saved generator state and a sample does not depend on the batch that it is
drawn in. PyTorch initialises weights from its global generator and from no other, so that one is
seeded in the same way while weights are made, and put back (``seeded_init``).
"""

import hashlib
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from latentlm_core import __version__
from latentlm_core.errors import ConfigError
from latentlm_core.processes import Processes, current

CACHED_KERNELS = 128
"""Shapes whose kernels a CPU keeps; 1,024 take gigabytes where lengths vary, and few come back."""
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN's cache and of PyTorch's, which read them when they begin."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of names and numbers, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by ``derive_seed(*parts)``."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


@contextmanager
def seeded_init(*parts: int | str) -> Iterator[None]:
    """Inside the block the global CPU generator is seeded for initial weights; then as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed("weights", *parts))
        yield


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device that is there.

    Of several processes each takes a card of its own for ``auto`` and ``cuda``.

    Raises:
        ConfigError: no such device on this machine, fewer cards than processes, or one card for
            several of them.
    """
    for cache in KERNEL_CACHES:
        os.environ.setdefault(cache, str(CACHED_KERNELS))
    processes = current()
    if processes.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return _own_card(processes)
    if processes.local_size > 1 and name.startswith("cuda:"):
        raise ConfigError(
            f"--device {name} is one card for {processes.local_size} processes, and each needs one "
            "of its own.",
            hint="Say --device cuda; CUDA_VISIBLE_DEVICES chooses among the cards.",
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(
            f"--device {name} is not on this machine; there is: auto, {', '.join(found)}."
        ) from None
    return device


def _own_card(processes: Processes) -> torch.device:
    count = torch.cuda.device_count()
    if processes.local_size > count:
        raise ConfigError(
            f"This machine has {count} cards for {processes.local_size} processes, and each needs "
            "one of its own.",
            hint=f"Say --nproc-per-node {count} to torchrun, or --device cpu.",
        )
    return torch.device("cuda", processes.local_rank)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is built in: into GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def missing_compiler() -> str | None:
    """The C++ compiler that ``torch.compile`` takes by default, where this machine lacks it."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    command = os.environ.get("CXX") or usual
    return command if shutil.which(shlex.split(command)[0]) is None else None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to ``device`` without making the host wait where the hardware allows it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for ``modules``; their modes are restored afterwards."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU was given to do; other devices have done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> dict[str, str]:
    """What a report needs to name so that its numbers can be repeated."""
    found = {"latentlm": __version__, "python": platform.python_version()}
    for package in ("torch", "torch-fidelity", "datasets", "safetensors", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def machine(device: torch.device | str = "cpu") -> str:
    """One line that names the hardware, for reports and benchmarks."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.partition(":")[2].strip() for line in info if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
