"""Memory and traffic of each GPU for the paper's large sizes, by simulation: no GPU is needed.

Every way to share a model is tried for 8, 64 and 256 GPUs, with blocks computed once and twice and,
where a GPU has several batches, with gradients summed once a step and for each; the cheapest that
fits a card is printed as a command. A card counts as full at 90 %: CUDA, NCCL and cuBLAS take
something for themselves, and memory has holes. ``footprint.py`` tells what is counted.

    python examples/scaling.py [--size latentlm-13b ...] [--json FILE.json]
    torchrun --nproc-per-node 4 examples/scaling.py --check    # a small model, really, beside it
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from footprint import MACHINE, Footprint, Plan, measure, predict, tiny_plans

from latentlm_core.files import write_json
from latentlm_core.processes import joined
from latentlm_core.runtime import versions

SIZES = ("latentlm-xl", "latentlm-3b", "latentlm-7b", "latentlm-13b")
STEP_ROWS, ROWS = 2048, 32
"""Sequences of a step, as in the paper, and of one of its batches."""
WAYS = (("ddp", 0, False), ("fsdp", MACHINE, False), ("fsdp", 0, False), ("fsdp", 0, True))
"""Sharing among all processes or those of a machine; with gradients summed for each batch."""
GIB = 2**30
CARDS = {"80 GB": 80 * GIB, "141 GB": 141 * GIB}
USABLE = 0.9


def check() -> None:
    """Print what a small model takes, measured and predicted, in torchrun's processes."""
    with joined() as processes:
        plans = tiny_plans(processes.size)
        measured = [measure(plan, processes, is_real=True) for plan in plans]
    if processes.is_main:
        show(
            [
                compared(plan, real, predict(plan))
                for plan, real in zip(plans, measured, strict=True)
            ]
        )


def compared(plan: Plan, real: Footprint, predicted: Footprint) -> dict[str, Any]:
    """What the table says of a way that was checked."""
    return {
        "how": _how(plan),
        "batches": plan.batches,
        "peak": f"{real.peak:,}",
        "predicted": f"{predicted.peak:,}",
        "sent": f"{real.traffic['sent']:,}",
        " predicted": f"{predicted.traffic['sent']:,}",
    }


def plans_of(recipe: str) -> list[Plan]:
    """The ways to run a recipe on one, 8 and 32 machines, cheapest first, for each number."""
    return [
        Plan(recipe, size, parallel, shard, recompute, min(ROWS, rows), max(1, rows // ROWS), each)
        for size in (MACHINE, 8 * MACHINE, 32 * MACHINE)
        for rows in (STEP_ROWS // size,)
        for recompute in (False, True)
        for parallel, shard, each in WAYS
        if shard < size and (rows > ROWS or not each)
    ]


def flags(plan: Plan) -> str:
    """What comes after ``latentlm``, as far as it differs from the recipe."""
    changes = {
        "trainer.parallel": plan.parallel,
        "trainer.shard_size": plan.shard_size,
        "trainer.recompute": str(plan.recompute).lower(),
        "trainer.reduce_each_batch": str(plan.reduce_each_batch).lower(),
        "data.batch_size": ROWS,
        "trainer.accumulate": STEP_ROWS // ROWS,
    }
    usual = ("ddp", 0, "false")
    sets = " ".join(f"--set {key}={value}" for key, value in changes.items() if value not in usual)
    return f"train-lm --recipe {plan.recipe} --data latents/imagenet {sets}"


def row(plan: Plan, footprint: Footprint) -> dict[str, Any]:
    """What the table says of a plan."""
    lasting = footprint.weights + footprint.moments + footprint.average
    return {
        "recipe": plan.recipe,
        "GPUs": plan.processes,
        "how": _how(plan),
        "rows x batches": f"{plan.rows} x {plan.batches}",
        "lasting": f"{lasting / GIB:.1f}",
        "gradients": f"{footprint.gradients / GIB:.1f}",
        "kept": f"{footprint.kept / GIB:.1f}",
        "peak": f"{footprint.peak / GIB:.1f}",
        "fits": ", ".join(name for name in CARDS if fits(footprint, name)) or "no",
        "sent": f"{footprint.traffic['sent'] / GIB:.1f}",
        "leaving": f"{footprint.traffic['leaving'] / GIB:.1f}",
    }


def _how(plan: Plan) -> str:
    name = "hsdp" if plan.shard_size else plan.parallel
    name += ", each batch" if plan.reduce_each_batch else ""
    return name + (", recompute" if plan.recompute else "")


def fits(footprint: Footprint, card: str) -> bool:
    """Whether a card has room for it."""
    return footprint.peak <= USABLE * CARDS[card]


def recommended(known: Sequence[tuple[Plan, Footprint]]) -> Iterator[tuple[str, Plan, Footprint]]:
    """For each card, recipe and number of GPUs the cheapest plan that fits."""
    for card in CARDS:
        for recipe, size in dict.fromkeys((plan.recipe, plan.processes) for plan, _ in known):
            for plan, footprint in known:
                if (plan.recipe, plan.processes) == (recipe, size) and fits(footprint, card):
                    yield card, plan, footprint
                    break


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for line in ({key: key for key in widths}, *rows):
        print("  ".join(str(line[key]).ljust(width) for key, width in widths.items()).rstrip())


def main() -> None:
    """Predict, or check."""
    parser = argparse.ArgumentParser(description="Memory and traffic of large sizes, simulated.")
    parser.add_argument("--size", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        check()
        return
    plans = [plan for recipe in options.size for plan in plans_of(recipe)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        known = list(zip(plans, pool.map(predict, plans), strict=True))
    print("GiB of one GPU, a step of 2,048 sequences\n")
    show([row(plan, footprint) for plan, footprint in known])
    for card, plan, footprint in recommended(known):
        print(f"\n{card}, {plan.processes} GPUs, {footprint.peak / GIB:.0f} GiB: {flags(plan)}")
    if options.json:
        rows = [asdict(plan) | asdict(footprint) for plan, footprint in known]
        write_json(options.json, {"versions": versions(), "unit": "bytes", "rows": rows})


if __name__ == "__main__":
    main()
