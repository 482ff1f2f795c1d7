"""Memory of long work on a CPU: 10,000 steps of training, 50,000 samples.

Tiny models, so that it takes minutes: what grows, grows with the number of steps and not with the
size. Each part runs in a process of its own, whose resident memory is read every few hundred steps;
a line is fitted to the last 80 % of the readings. The mix of text and images has rows of a
different length in each batch, in bfloat16, for which a CPU makes kernels by shape; that part runs
a second time with as many of them kept as oneDNN and PyTorch keep by themselves.

    python examples/flat_memory.py [--part train-lm] [--steps 10000] [--json FILE] FOLDER

FOLDER is better on a file system in memory (/dev/shm): 50,000 images are written there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from latentlm_core import workflows
from latentlm_core.files import write_json
from latentlm_core.runtime import KERNEL_CACHES, machine, versions

MIB = 2**20
WARM_UP = 0.2
"""Share of the readings that the line leaves out."""
READINGS = 50
VAE = [
    *("tokenizer.network.channels=[8,16]", "data.batch_size=4", "trainer.precision=bfloat16"),
    *("loss.gan_weight=0.1", "loss.gan_start_step=100", "loss.critic.base_channels=32"),
    "loss.critic.num_layers=1",
]
LM = [
    *("model.backbone.hidden_size=32", "model.backbone.intermediate_size=64"),
    *("model.backbone.num_layers=1", "model.head.num_layers=1", "model.head.intermediate_size=64"),
    *("data.batch_elements=512", "data.row_length=160", "trainer.precision=bfloat16"),
]
IMAGES = [
    *("model.backbone.hidden_size=32", "model.backbone.intermediate_size=64"),
    *("model.backbone.num_layers=1", "model.head.num_layers=1", "trainer.total_steps=20"),
]


class MemoryBar:
    """A ``Progress`` that reads the memory of this process while work goes on.

    Args:
        total: of the work that counts; readings are spread over it.

    Attributes:
        readings: (how much is done, resident MiB).
    """

    def __init__(self, total: int) -> None:
        self.readings: list[tuple[int, float]] = []
        self._every, self._done = max(1, total // READINGS), 0

    @contextmanager
    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Iterator["MemoryBar"]:
        """Begin a piece of work."""
        self._done = 0
        self.readings.clear()
        yield self

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Count, and read the memory every so often."""
        before, self._done = self._done, self._done + amount
        if before // self._every != self._done // self._every:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.readings.append((self._done, pages * os.sysconf("SC_PAGE_SIZE") / MIB))

    def note(self, message: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing."""


def train_vae(steps: int, out: Path, progress: MemoryBar) -> None:
    """A sigma-VAE with its discriminator."""
    often = [f"trainer.total_steps={steps}", "trainer.save_every=1000", "trainer.log_every=100"]
    workflows.train_vae(
        data="embedded:shapes",
        recipe="tiny",
        overrides=VAE + often,
        out=out,
        device="cpu",
        progress=progress,
    )


def train_lm(steps: int, out: Path, progress: MemoryBar) -> None:
    """A LatentLM of packed text and images."""
    often = [f"trainer.total_steps={steps}", "trainer.save_every=1000", "trainer.log_every=100"]
    workflows.train_lm(
        data="text:pydoc=1,latents/shapes=2,interleaved:latents/shapes=1",
        recipe="multimodal-tiny",
        overrides=LM + often,
        out=out,
        device="cpu",
        progress=progress,
    )


def sample(count: int, out: Path, progress: MemoryBar) -> None:
    """Images of classes, in batches of 100."""
    workflows.sample(
        model="runs/lm",
        num_samples=count,
        num_inference_steps=2,
        out=out,
        batch_size=100,
        device="cpu",
        progress=progress,
    )


PARTS = {
    "train-vae": train_vae,
    "train-lm": train_lm,
    "train-lm, 1024 kernels": train_lm,
    "sample": sample,
}


def prepare() -> None:
    """A tokenizer, latents, and a model that has hardly learned."""
    short = [*VAE, "trainer.total_steps=20"]
    vae, latents = Path("runs/vae"), Path("latents/shapes")
    shapes = "embedded:shapes"
    workflows.train_vae(data=shapes, recipe="tiny", overrides=short, out=vae, device="cpu")
    workflows.tokenize(data=shapes, vae=str(vae), out=latents, device="cpu")
    lm = Path("runs/lm")
    workflows.train_lm(data=str(latents), recipe="tiny", overrides=IMAGES, out=lm, device="cpu")


def run_part(name: str, amount: int) -> dict[str, Any]:
    """Do one part in this process; its figures."""
    progress, begun = MemoryBar(amount), time.monotonic()
    with TemporaryDirectory(dir=".") as out:
        PARTS[name](amount, Path(out), progress)
    done, resident = np.array(progress.readings).T
    settled = done > done[-1] * WARM_UP
    slope, _ = np.polyfit(done[settled], resident[settled], 1)
    return {
        "amount": amount,
        "first_mib": round(float(resident[0]), 1),
        "settled_mib": round(float(resident[settled][0]), 1),
        "last_mib": round(float(resident[-1]), 1),
        "mib_per_thousand": round(1000 * float(slope), 3),
        "seconds": round(time.monotonic() - begun),
        "readings": [(int(n), round(float(mib), 1)) for n, mib in zip(done, resident, strict=True)],
    }


def main() -> None:
    """Run the parts, each in a process of its own, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append", help="of several; default: all")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help="of one part: in this process")
    options = parser.parse_args()
    script, path = Path(__file__).resolve(), options.json and options.json.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.folder)
    os.environ["LATENTLM_HOME"] = os.getcwd()
    amounts = {name: options.samples if name == "sample" else options.steps for name in PARTS}
    if options.here:
        print(json.dumps(run_part(options.part[0], amounts[options.part[0]])))
        return
    prepare()
    found: dict[str, Any] = {"machine": machine(), "versions": versions()}
    for name in options.part or PARTS:
        counts = [f"--steps={amounts[name]}", f"--samples={amounts[name]}", f"--part={name}"]
        command = [sys.executable, str(script), ".", "--here", *counts]
        kept = name.endswith("kernels") and dict.fromkeys(KERNEL_CACHES, "1024")
        said = subprocess.check_output(command, env=os.environ | (kept or {}), text=True)
        found[name] = json.loads(said.splitlines()[-1])
        print(name, {key: value for key, value in found[name].items() if key != "readings"})
        if path:
            write_json(path, found)


if __name__ == "__main__":
    main()
