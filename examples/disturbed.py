"""Commands that are disturbed (``kill_harness.py``): starts, where they were hit, what they left.

Most starts are forks of this process, which has torch imported, so that signals hit the work and
not the imports; the others are the real command in a fresh interpreter.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from latentlm_core.files import sha256_file

STEPS = 48
STAGES: dict[str, str] = {
    "train-vae": "--data ../few-dots --out runs/vae --recipe tiny"
    " --set tokenizer.network.image_size=16 --set tokenizer.network.channels=[8,16]"
    " --set data.batch_size=8 --set loss.gan_weight=0.1 --set loss.gan_start_step=6"
    " --set loss.critic.base_channels=32 --set loss.critic.num_layers=1"
    f" --set trainer.total_steps={STEPS} --set trainer.save_every=2 --set trainer.log_every=3"
    " --set trainer.validate_every=2 --set trainer.keep_best=true --set trainer.async_save=true",
    "tokenize": "--data ../dots --vae runs/vae --out latents/dots --batch-size 256",
    "train-lm": "--data latents/dots --out runs/lm --recipe tiny"
    " --set model.backbone.hidden_size=32 --set model.backbone.intermediate_size=64"
    " --set data.batch_size=8 --set trainer.accumulate=2"
    f" --set trainer.total_steps={STEPS} --set trainer.save_every=3 --set trainer.log_every=2"
    " --set trainer.keep_every=9 --set trainer.validate_every=12",
    "sample": "--model runs/lm --out samples/dots --class 0 --class 3 -n 20 --batch-size 4 --npz",
}
"""The commands, in their order."""
RESULTS = dict(zip(STAGES, ("runs/vae", "latents/dots", "runs/lm", "samples/dots"), strict=True))
"""The folder that each of them writes."""
NUM_SAMPLES = 40
SIDE, CLASSES = 16, 4
CLOCK_KEYS = {
    "samples_per_second",
    "tokens_per_second",
    "flops_utilisation",
    "data_wait_share",
    "seconds",
}
"""What a clock decides: of metrics.jsonl, of the provenance in config.json, of state.json."""
SEALS = {"checksum", "sha256"}
"""Checksums over the file that they stand in, and so over what a clock decides."""
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
PRELOADED = (
    *("latentlm_cli.app", "latentlm_core.workflows", "torch._dynamo", "torch.distributed.fsdp"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "numpy.random", "rich.console"),
)
"""What commands import while they run."""
PATIENCE = 900.0
"""Seconds after which a command hangs."""
BROKEN = 70
"""Exit code of a fork that ends with an exception."""


@dataclass(slots=True)
class Start:
    """One start of a command.

    Attributes:
        pid: of its process.
        since: when it was started, in nanoseconds of the file system's clock.
        log: what it says.
        code: exit code as shells count it, once it has ended.
    """

    pid: int
    since: int
    log: Path
    code: int | None = None

    @classmethod
    def of(
        cls, stage: str, home: Path, log: Path, fresh: bool, extra: Mapping[str, str]
    ) -> "Start":
        """Start a command in a workspace.

        Args:
            stage: which one.
            home: the workspace.
            log: where its output goes.
            fresh: start an interpreter rather than fork.
            extra: environment variables.
        """
        words = [stage, *STAGES[stage].split(), "--device", "cpu", "--json"]
        log.touch()
        since = time.time_ns() - 10_000_000  # the clock of files is a jiffy behind
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _become(words, home, log, fresh, {"LATENTLM_HOME": str(home), **extra})
        return cls(pid, since, log)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = 128 - code if code < 0 else code
            elif time.monotonic() > until:
                return False
            else:
                time.sleep(0.002)
        return True

    def send(self, number: int) -> None:
        """Send a signal if it still runs; wait for its end."""
        if self.code is None:
            os.kill(self.pid, number)
            if not self.wait(PATIENCE):
                os.kill(self.pid, signal.SIGKILL)
                raise SystemExit(f"A command does not end: {self.text()}")

    def text(self) -> str:
        """What it said so far."""
        return self.log.read_text()


def prepare() -> None:
    """Have in this process, of which commands are forks, what they import; one thread in each."""
    if any(os.environ.get(name) != number for name, number in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ONE_THREAD)
    for module in PRELOADED:
        import_module(module)
    Image.init()


def _become(
    words: Sequence[str], home: Path, log: Path, fresh: bool, variables: Mapping[str, str]
) -> None:
    """Turn this process, a fork, into a command; does not return."""
    code = BROKEN
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        os.chdir(home)
        os.environ.update(variables)
        handle = os.open(log, os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", "latentlm_cli", *words])
        sys.argv = ["latentlm", *words]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import_module("latentlm_cli.app").main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def moment(stage: str, folder: Path, start: Start) -> str:
    """Where in its work a command was hit, told by what it left."""

    def is_new(path: Path) -> bool:
        return path.exists() and path.stat().st_ctime_ns >= start.since

    parts = list(folder.rglob(f".*.{start.pid}.part"))
    parts += filter(is_new, [*folder.rglob(".step-*.part"), *folder.rglob(".samples.npy.part")])
    if parts:
        name = min((path.name for path in parts), key=len).lstrip(".").split(".")[0]
        return f"writing {re.sub('[0-9]+', 'N', name)}"
    if any(map(is_new, folder.rglob(".*.old"))):
        return "replacing or dropping a folder"
    if stage == "tokenize":
        if (folder / "manifest.json").exists():
            return "after the manifest"
        return "encoding" if is_new(folder / "progress/plan.json") else "starting"
    if stage == "sample":
        if not is_new(folder / "settings.json"):
            return "starting"
        num_images = len(list(folder.glob("0*.png")))
        return "drawing" if num_images < NUM_SAMPLES else "after the last image"
    if not is_new(folder / "metrics.jsonl"):
        return "starting"
    if (folder / "export").exists():
        return "after the export"
    steps = sorted(path.name for path in folder.glob("checkpoints/step-*"))
    if not steps:
        return "before the first checkpoint"
    return "between checkpoints" if steps[-1] < f"step-{STEPS:08d}" else "before the export"


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder by its relative path: a digest of what no clock decides."""
    return {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock" and not (path.is_dir() and any(path.iterdir()))
    }


def last_only(found: Mapping[str, str]) -> dict[str, str]:
    """Without all checkpoints but the last: who is asked to stop saves more of them."""
    last = f"checkpoints/step-{STEPS:08d}"
    return {k: v for k, v in found.items() if not k.startswith("checkpoints/") or last in k}


def make_dots(folder: Path, count: int) -> None:
    """A folder of small images of four classes: a dot whose hue is its class."""
    for split, size in (("train", count), ("test", 16)):
        for label in range(CLASSES):
            (folder / split / f"class-{label}").mkdir(parents=True)
        for index in range(size):
            image = Image.new("RGB", (SIDE, SIDE), (index % 256, 99, 40))
            hue = tuple(240 if label == index % CLASSES else 20 for label in range(3))
            image.paste(hue, (index % 9, index // 9 % 9, index % 9 + 5, index // 9 % 9 + 5))
            image.save(folder / split / f"class-{index % CLASSES}" / f"{index:05d}.png")


def _digest(path: Path) -> str:
    if path.is_dir():
        return "an empty folder"
    if path.name == "metrics.jsonl":
        return json.dumps([_timeless(json.loads(line)) for line in path.open()])
    if path.name in ("config.json", "state.json"):
        return json.dumps(_timeless(json.loads(path.read_text())))
    return sha256_file(path)


def _timeless(value: Any) -> Any:
    """Without the values of a clock, and the checksums that they go into."""
    if not isinstance(value, dict):
        return value
    is_timed = any(key in CLOCK_KEYS for key in _keys(value))
    dropped = CLOCK_KEYS | (SEALS if is_timed else set())
    return {key: _timeless(inner) for key, inner in value.items() if key not in dropped}


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
