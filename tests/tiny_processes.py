"""Real processes that run commands together, as torchrun starts them.

``launch`` starts them, ``main`` is what each of them runs.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from latentlm_core import files

Command = tuple[str, str]
"""A folder below the root, which is the workspace, and what stands after ``latentlm``."""


def launch(
    size: int, commands: Sequence[Command], root: Path, death: tuple[int, int] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run commands one after the other in ``size`` processes.

    Args:
        size: number of processes.
        commands: what they run.
        root: of the commands' workspaces.
        death: a rank, and the number of the file in whose writing it is killed.

    Returns:
        what each of the processes said, by rank.
    """
    job = json.dumps({"root": str(root), "commands": commands, "death": death})
    port = _free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.tiny_processes", job],
            cwd=Path(__file__).parents[1],
            env=os.environ | _variables(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=300) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *both)
        for process, both in zip(started, said, strict=True)
    ]


def results(done: Sequence[subprocess.CompletedProcess[str]]) -> list[dict[str, Any]]:
    """What rank 0 said on stdout, a result of ``--json`` a command."""
    for process in done:
        assert process.returncode == 0, process.stderr
    assert all(not process.stdout and not process.stderr for process in done[1:])
    return [json.loads(line) for line in done[0].stdout.splitlines()]


def torchrun(size: int, words: Sequence[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as users do."""
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.run(
        [sys.executable, *starter, "-m", "latentlm_cli", *words],
        env=os.environ | {"LATENTLM_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def main(job: dict[str, Any]) -> None:
    """Run the commands in this process, one of several."""
    import torch.distributed as dist

    from latentlm_cli import app, console
    from latentlm_core.data import caching, speech_caching
    from latentlm_core.processes import joined

    console.GRACE_SECONDS = 0.5
    caching.SHARD_EXAMPLES = 40
    speech_caching.encode_speech.__kwdefaults__["shard_size"] = 5
    if job["death"] and job["death"][0] == int(os.environ["RANK"]):
        _die_writing(job["death"][1])
    several = len(job["commands"]) > 1  # one joins its processes by itself
    with joined() if several else nullcontext():
        for folder, words in job["commands"]:
            os.chdir(Path(job["root"], folder))
            code = app.app(shlex.split(words), standalone_mode=False)
            if code:
                sys.exit(code)
        group = weakref.ref(dist.group.WORLD) if dist.is_initialized() else None
    assert group is None or group() is None, "the group is held: gloo's threads outlive it"


def _die_writing(number: int) -> None:
    """Let this process be killed when it has half written its file of this number."""
    write, left = files.write_file, [number]

    def write_or_die(path: Path, put: Any) -> None:
        left[0] -= 1
        if left[0] > 0:
            write(path, put)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.{os.getpid()}.part").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    files.write_file = write_or_die


def _variables(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "LATENTLM_HOME": ".",
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
