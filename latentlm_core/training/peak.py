"""What a device could compute at most: the ceiling that model FLOPs utilisation is a share of.

In bfloat16 on GPUs whose data sheets we know it is the sheet's dense figure, which the literature
divides by. Everywhere else it is measured once a process, by a large product: the best that its
matrix library does there (a third of a second on two cores, far less on a GPU). A product stays
below what a sheet promises, so a share of the one is larger than a share of the other.
"""

import time
from functools import cache

import torch

from latentlm_core.runtime import synchronize

SHEETS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
}
"""Dense bfloat16 operations a second, by what the name of a GPU contains; the first counts."""
SIDE = {"cuda": 8192}
"""Of the product that is measured, and on other devices:"""
OTHER_SIDE = 1024
REPEATS = 10


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of products in ``dtype``: the data sheet's, or else measured."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in SHEETS.items():
            if part in name:
                return flops
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product, the fastest of some."""
    side = SIDE.get(device.type, OTHER_SIDE)
    left, out = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    torch.mm(left, left, out=out)
    seconds = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
