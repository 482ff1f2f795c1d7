"""Disks that are full, read-only or hold other things than they should, under every command.

Each command ends with one sentence that names a path, and goes on once there is space: what it
makes is then what it would have made undisturbed. Disks are small ones in memory, which only root
may mount.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core.data.media import read_image, write_png
from latentlm_core.data.sources import open_source
from latentlm_core.files import sha256_file
from latentlm_core.progress import SilentProgress
from latentlm_core.training.runlog import read_metrics
from latentlm_core.workflows import tokenize
from tests.tiny_latents import content
from tests.tiny_training import TIMING

DATA = "embedded:shapes"
FEW = ["trainer.total_steps=6", "trainer.save_every=2", "trainer.log_every=2"]
SETTINGS = [word for setting in FEW for word in ("--set", setting)]
COMMANDS = {
    "train-vae": ["train-vae", "--data", DATA, "--out", "runs/vae", *SETTINGS],
    "tokenize": ["tokenize", "--data", DATA, "--vae", "runs/vae", "--out", "latents/set"],
    "train-lm": ["train-lm", "--data", "latents/set", "--out", "runs/lm", *SETTINGS],
    "sample": ["sample", "--model", "runs/lm", "-n", "9", "--steps", "2", "--out", "samples/set"],
}
MADE = dict(zip(COMMANDS, ("runs/vae", "latents/set", "runs/lm", "samples/set"), strict=True))
FREE_KIB = (0, 24, 300)
"""Left on a disk, one after the other: for nothing, for small files, for some large ones."""
DISK_MIB = 64


def run(home: Path, command: str) -> tuple[int, str]:
    """Exit code and standard error of a command in a workspace, on the CPU."""
    environment = {"LATENTLM_HOME": str(home), "COLUMNS": "500"}
    with chdir(home):
        result = CliRunner(env=environment).invoke(app, [*COMMANDS[command], "--device", "cpu"])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result.exit_code, result.stderr


def refusal(home: Path, command: str) -> str:
    """The sentence with which a command ends."""
    code, said = run(home, command)
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    return line


def outcome(home: Path, command: str) -> dict[str, object]:
    """What a command made, without what a clock decides; its folder holds nothing half made."""
    folder = home / MADE[command]
    kinds = (".safetensors", ".png", "manifest.json", "samples.jsonl")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert not [path for path in paths if ".part" in str(path) or "progress" in path.parts]
    made: dict[str, object] = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in paths
        if path.name.endswith(kinds) and path.name != "curves.png"
    }
    if (folder / "metrics.jsonl").is_file():
        rows = read_metrics(folder / "metrics.jsonl")
        made["rows"] = [{key: row[key] for key in row.keys() - TIMING} for row in rows]
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A workspace in which every command was run undisturbed."""
    home = tmp_path_factory.mktemp("whole")
    for command in COMMANDS:
        assert run(home, command)[0] == 0
    return home


def before(whole: Path, home: Path, command: str) -> Path:
    """A copy of what a command begins with."""
    for earlier in list(COMMANDS)[: list(COMMANDS).index(command)]:
        shutil.copytree(whole / MADE[earlier], home / MADE[earlier])
    return home


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk, or a skip that says why there is none."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk in memory cannot be mounted here (root may)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@contextmanager
def filled(disk: Path, free_kib: int) -> Iterator[None]:
    """Leave so much space on a disk."""
    ballast = disk / "ballast"
    status = os.statvfs(disk)
    size = max(status.f_bavail * status.f_frsize - (free_kib << 10), 0)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    try:
        yield
    finally:
        ballast.unlink()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(whole, disk, command):
    home, codes = before(whole, disk, command), []
    earlier = content(home)
    for free in FREE_KIB:
        with filled(disk, free):
            code, said = run(home, command)
        codes.append(code)
        if code:
            assert "No space left on device" in said
            assert str(home) in said or MADE[command] in said
            assert "Traceback" not in said
    assert codes[0] == 1
    assert run(home, command)[0] == 0
    assert outcome(home, command) == outcome(whole, command)
    now = content(home)
    assert {name: now[name] for name in earlier} == earlier


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_disk(whole, disk, command):
    home = before(whole, disk, command)
    _mount("-o", "remount,ro", str(disk))
    said = refusal(home, command)
    assert "Read-only file system" in said
    assert MADE[command] in said
    _mount("-o", "remount,rw", str(disk))
    assert run(home, command)[0] == 0
    assert outcome(home, command) == outcome(whole, command)


FILES = {
    "train-vae": ("runs", "runs/vae/checkpoints", "runs/vae/export"),
    "tokenize": ("latents", "latents/set", "latents/set/tokenizer"),
    "train-lm": ("runs/lm",),
    "sample": ("samples", "samples/set"),
}
"""Names of folders in whose place there is a file."""
FOLDERS = {
    "train-vae": ("runs/vae/metrics.jsonl", "runs/vae/.lock"),
    "tokenize": ("latents/set/manifest.json", "latents/set/shard-00000.safetensors"),
    "train-lm": ("runs/lm/config.json",),
    "sample": ("samples/set/settings.json", "samples/set/grid.png", "samples/set/000003.png"),
}
"""Names of files in whose place there is a folder."""
PLACES = [
    *((command, name, False) for command, names in FILES.items() for name in names),
    *((command, name, True) for command, names in FOLDERS.items() for name in names),
]


@pytest.mark.parametrize(("command", "name", "is_folder"), PLACES)
def test_a_folder_in_the_place_of_a_file_and_the_reverse(whole, tmp_path, command, name, is_folder):
    home = before(whole, tmp_path, command)
    if (home / name).exists():
        pytest.skip("earlier commands made that folder")
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    if is_folder:
        (home / name).mkdir()
    else:
        (home / name).write_text("mine")
    said = refusal(home, command)
    assert str(Path(name).parent) in said
    assert (home / name).is_dir() if is_folder else (home / name).read_text() == "mine"
    (home / name).rmdir() if is_folder else (home / name).unlink()
    assert run(home, command)[0] == 0
    assert outcome(home, command) == outcome(whole, command)


class Vanishing(SilentProgress):
    """Removes files as soon as something was encoded."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.warnings = paths, list[str]()

    @contextmanager
    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Iterator["Vanishing"]:
        yield self

    def advance(self, amount: int = 1, **figures: float) -> None:
        for path in self.paths:
            path.unlink(missing_ok=True)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_images_that_vanish_while_a_set_is_made(whole, tmp_path):
    source = open_source(DATA)
    for number in range(40):
        write_png(tmp_path / "images" / f"{number:02d}.png", source[number].image)
    progress = Vanishing([tmp_path / "images" / "38.png", tmp_path / "images" / "39.png"])
    tokenize(
        data=str(tmp_path / "images"),
        vae=str(whole / "runs/vae"),
        out=tmp_path / "set",
        batch_size=4,
        device="cpu",
        progress=progress,
    )
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert [item["reason"] for item in manifest["skipped"]] == [
        f"{number}.png is not there, or no file." for number in (38, 39)
    ]
    assert manifest["num_examples"] == 38
    assert len(progress.warnings) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/config.json"])
def test_a_file_of_an_export_that_vanishes(whole, tmp_path, name):
    home = before(whole, tmp_path, "sample")
    (home / "runs/lm/export" / name).rename(tmp_path / "kept")
    assert "runs/lm" in refusal(home, "sample")
    (tmp_path / "kept").rename(home / "runs/lm/export" / name)
    assert run(home, "sample")[0] == 0
    assert outcome(home, "sample") == outcome(whole, "sample")
    assert read_image(home / "samples/set/grid.png", "grid").size
