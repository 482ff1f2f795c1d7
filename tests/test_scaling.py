"""Many GPUs where there is none: the simulation of large sizes, and the script for Slurm.

The simulation must say of a small model what real processes take. Of Slurm there are only its
commands here, as short scripts.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from latentlm_core.artifacts import build_generator
from latentlm_core.processes import ALONE, current
from latentlm_core.recipes import lm_recipe
from latentlm_core.training.hardware import blocks_of
from tests.crew import crew

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = 4
"""Processes."""


@cache
def example(name: str) -> ModuleType:
    """A module of the examples, which find one another as scripts do."""
    sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def _measured() -> list[Any]:
    footprint, processes = example("footprint"), current()
    plans = footprint.tiny_plans(processes.size)
    return [footprint.measure(plan, processes, is_real=True) for plan in plans]


@pytest.fixture(scope="module")
def predicted() -> dict[Any, Any]:
    """What a small model would take, by each way of sharing it."""
    footprint = example("footprint")
    return {plan: footprint.predict(plan) for plan in footprint.tiny_plans(SIZE)}


def test_the_prediction_is_what_real_processes_take(predicted):
    assert {(plan.parallel, plan.shard_size) for plan in predicted} == {
        ("ddp", 0),
        ("fsdp", 0),
        ("fsdp", SIZE // 2),
    }
    measured = crew().run(SIZE, _measured)[0]
    for plan, real in zip(predicted, measured, strict=True):
        for name in ("weights", "moments", "average", "gradients", "traffic"):
            assert getattr(predicted[plan], name) == getattr(real, name), (name, plan)
        for name in ("kept", "peak"):  # gloo's threads let go of a buffer when it suits them
            near = pytest.approx(getattr(real, name), rel=0.1)
            assert getattr(predicted[plan], name) == near, (name, plan)


def test_traffic_and_weights_are_what_arithmetic_says(predicted):
    """Blocks are gathered twice in bfloat16, the rest once; gradients are summed in float32."""
    model = build_generator(lm_recipe("tiny").model.complete((4, 4), 16, 1001))
    plain = num_weights(model)
    whole, blocks = _padded(model), sum(map(_padded, blocks_of(model)))
    assert whole > plain, "first axes are padded, so padding is tested"
    ddp, fsdp, *_, each = predicted.values()
    assert fsdp.weights == 4 * whole // SIZE
    assert fsdp.traffic["sent"] == (2 * (whole + blocks) + 4 * whole) * (SIZE - 1) // SIZE
    assert each.traffic["sent"] == 3 * fsdp.traffic["sent"], "for each of three batches"
    assert each.gradients == fsdp.gradients
    assert ddp.weights == ddp.gradients == 4 * plain
    assert ddp.traffic["sent"] == 2 * 4 * plain * (SIZE - 1) // SIZE


def num_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _padded(module: nn.Module) -> int:
    """Numbers in a module whose first axes are padded to a multiple of the processes."""
    return sum(-(-len(w) // SIZE) * SIZE * w[0].numel() for w in module.parameters())


def test_only_what_crosses_machines_leaves_one():
    """Eight GPUs a machine: a group within one sends nothing out, a ring of all sends once."""
    meter = example("footprint").Meter(None)
    meter.communicate("all_gather", 800, range(8))
    assert meter.traffic == {"all_gather": 1, "sent": 700, "leaving": 0}
    meter.communicate("all_gather", 1600, range(16))
    assert meter.traffic == {"all_gather": 2, "sent": 2200, "leaving": 1500}
    meter.communicate("all_reduce", 100, range(0, 16, 8))  # one of eight such groups
    assert meter.traffic["leaving"] == 1500 + 8 * 100


def test_the_recommended_plan_is_the_cheapest_that_fits():
    module = example("scaling")
    plans = module.plans_of("latentlm-xl")
    peaks = {"ddp": 200, "fsdp": 60}
    known = [(plan, _footprint(peaks[plan.parallel])) for plan in plans]
    for _, plan, _ in module.recommended(known):
        cheapest = 0 if plan.processes == module.MACHINE else module.MACHINE
        assert (plan.parallel, plan.recompute, plan.shard_size) == ("fsdp", False, cheapest)
    words = module.flags(plans[-1]).split()
    sets = [change for flag, change in pairwise(words) if flag == "--set"]
    recipe = lm_recipe("latentlm-xl", sets)
    assert recipe.trainer.parallel == "fsdp"
    assert recipe.trainer.recompute
    assert recipe.data.batch_size * recipe.trainer.accumulate == module.STEP_ROWS


def _footprint(peak: int) -> Any:
    module = example("scaling")
    return module.Footprint(0, 0, 0, 0, 0, peak * module.GIB, {})


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_the_prediction_of_sampling_is_what_the_engine_takes(mode):
    module = example("memory_targets")
    config = lm_recipe("tiny").model.complete((4, 4), 16, 11)
    predicted, real = (
        module.sampling(config, 16, mode, torch.bfloat16, 8, is_real) for is_real in (False, True)
    )
    assert predicted == real
    assert predicted.weights == pytest.approx(2 * num_weights(build_generator(config)), rel=0.01)


def test_alone_a_process_keeps_no_buckets():
    module, plan = example("footprint"), example("footprint").Plan("tiny", 1, "ddp", grid=(4, 4))
    alone = module.measure(plan, ALONE, is_real=False)
    of_two = module.predict(replace(plan, processes=2))
    assert alone.peak == pytest.approx(of_two.peak - alone.weights, rel=0.001)


STUBS = {
    "srun": """echo "$@" > srun.txt
[ "$RESULT" = stopped ] || exit "$RESULT"
while [ ! -e asked ]; do sleep 0.02; done
exit 1""",
    "scancel": 'echo "$@" > scancel.txt; touch asked',
    "scontrol": """case $1 in
show) printf 'node3\\nnode4\\n' ;;
*) echo "$@" > requeue.txt ;;
esac""",
}


def _batch_job(folder: Path, result: str) -> subprocess.Popen[bytes]:
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "RESULT": result,
        "SLURM_JOB_ID": "71234",
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
    }
    command = ["bash", EXAMPLES / "slurm.sh", "train-lm", "--set", "trainer.seed=1"]
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables)


def test_slurm_starts_a_torchrun_on_each_machine(tmp_path):
    assert _batch_job(tmp_path, "0").wait(timeout=20) == 0
    said = (tmp_path / "srun.txt").read_text()
    assert "torchrun --nnodes 2 --nproc-per-node gpu" in said
    assert "--rdzv-endpoint node3:31234 -m latentlm_cli train-lm --set trainer.seed=1" in said
    assert not (tmp_path / "requeue.txt").exists()


def test_slurm_puts_back_what_it_stopped(tmp_path):
    job = _batch_job(tmp_path, "stopped")
    while not (tmp_path / "srun.txt").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 1
    assert (tmp_path / "scancel.txt").read_text() == "--signal=TERM 71234\n"
    assert (tmp_path / "requeue.txt").read_text() == "requeue 71234\n"


def test_slurm_does_not_put_back_what_failed(tmp_path):
    assert _batch_job(tmp_path, "3").wait(timeout=20) == 3
    assert not (tmp_path / "requeue.txt").exists()
