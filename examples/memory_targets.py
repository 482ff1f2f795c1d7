"""What sampling and training LatentLM-L (479M) take of a GPU, by simulation: no GPU is needed.

The engine and the training step are the real ones, run without data under the meter of
``footprint.py``. Kernels are those of a CPU; what CUDA, cuBLAS and holes in memory take comes on
top, about 1 GB. Of sampling, a few positions are run: its buffers are there from the first one on.

    python examples/memory_targets.py [--json FILE.json]
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from footprint import CHANNELS, VOCABULARY, Meter, Plan, measure
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latentlm_core.artifacts import build_generator
from latentlm_core.diffusion import NoiseSchedule
from latentlm_core.files import write_json
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig, LatentLMSize
from latentlm_core.processes import ALONE
from latentlm_core.recipes import lm_recipe, vae_recipe
from latentlm_core.runtime import versions
from latentlm_core.sampling import LatentLMEngine, Mode, Request, SamplerConfig
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.vit import ViTConfig
from latentlm_core.workflows.drawing import MAX_PIXELS

SIZE, VAE, BATCH, GRID = "latentlm-l", "imagenet", 64, (16, 16)
GUIDED = SamplerConfig(guidance_scale=2.0)
MODES: tuple[Mode, ...] = ("eager", "static")
"""A captured step has the buffers of a static one."""
TARGETS = {"sampling": 8e9, "training": 40e9}
"""Bytes."""
POSITIONS = 2
"""That are simulated."""

M = TypeVar("M", bound=nn.Module)


class EnoughError(Exception):
    """The engine has shown what it takes."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Bytes of sampling a batch.

    Attributes:
        weights: of the model.
        drawing: the most at one time, weights and cache included.
        again: the same of the next batch.
    """

    weights: int
    drawing: int
    again: int


def sampling(
    config: LatentLMConfig,
    num_latents: int,
    mode: Mode,
    dtype: torch.dtype,
    batch: int = BATCH,
    is_real: bool = False,
) -> Sampling:
    """What the engine takes for class-conditional images, with data or without."""
    without_data = None if is_real else FakeTensorMode(allow_non_fake_inputs=True)
    meter, peaks = Meter(without_data), []
    with without_data or nullcontext(), meter:
        model = blank(lambda: build_generator(config), dtype)
        weights = meter.bytes
    assert isinstance(model, LatentLM)
    model.head.schedule = NoiseSchedule(config.head.diffusion)  # whose numbers are needed
    engine = LatentLMEngine(model, GUIDED, mode)
    requests = [Request((0,), (config.vocab_size - 1,), num_latents, i) for i in range(batch)]
    for _ in range(2):
        with without_data or nullcontext(), meter, suppress(EnoughError):
            meter.restart()
            engine.generate(requests, _enough())
        peaks.append(meter.peak)
    return Sampling(weights, *peaks)


def decoding(num_images: int) -> int:
    """Bytes that decoding images takes at most, the decoder's weights included."""
    config = vae_recipe(VAE).tokenizer
    with FakeTensorMode() as mode, Meter(mode) as meter:
        vae = blank(lambda: build_tokenizer(config), torch.float32)
        latents = torch.zeros(num_images, GRID[0] * GRID[1], config.latent_channels)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            vae.decode(latents, GRID)
        return meter.peak


def blank(build: Callable[[], M], dtype: torch.dtype) -> M:
    """A network whose weights are zero, and not there before they have this dtype."""
    with torch.device("meta"):
        network = build().eval()
    for part in network.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            zeros = torch.zeros(weight.shape, dtype=dtype, device="cpu")
            setattr(part, name, nn.Parameter(zeros, requires_grad=False))
    return network


def _enough() -> Callable[[], None]:
    """A listener that ends the drawing after some positions."""
    left = [POSITIONS]

    def hear() -> None:
        left[0] -= 1
        if not left[0]:
            raise EnoughError

    return hear


def training(rows: int, batches: int, recompute: bool) -> dict[str, Any]:
    """What a step of 64 sequences takes."""
    plan = Plan(SIZE, 1, "ddp", recompute=recompute, rows=rows, batches=batches, grid=GRID)
    found = asdict(measure(plan, ALONE, is_real=False))
    del found["traffic"]
    return {"rows": rows, "batches": batches, "recompute": recompute, **found}


def main() -> None:
    """Simulate, print and keep."""
    parser = argparse.ArgumentParser(description="Memory of LatentLM-L at batch 64, simulated.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = lm_recipe(SIZE).model
    assert isinstance(size, LatentLMSize)
    model = size.complete(GRID, CHANNELS, VOCABULARY)
    network = vae_recipe(VAE).tokenizer.network
    assert isinstance(network, ViTConfig)
    decoded = decoding(MAX_PIXELS // network.image_size**2)
    drawn = []
    for mode, dtype in product(MODES, (torch.bfloat16, torch.float32)):
        found = asdict(sampling(model, GRID[0] * GRID[1], mode, dtype))
        name = str(dtype).removeprefix("torch.")
        drawn.append({"mode": mode, "dtype": name, **found, "decoding": decoded})
    trained = [training(BATCH, 1, False), training(BATCH // 2, 2, False), training(BATCH, 1, True)]
    for row in drawn:
        print(
            f"sampling, {row['mode']}, {row['dtype']}: weights {row['weights'] / 1e9:.2f}, "
            f"drawing {row['drawing'] / 1e9:.2f}, the next batch {row['again'] / 1e9:.2f}, "
            f"decoding {row['decoding'] / 1e9:.2f} GB more"
        )
    for row in trained:
        print(
            f"training, {row['rows']} x {row['batches']} sequences"
            f"{', recompute' if row['recompute'] else ''}: kept {row['kept'] / 1e9:.1f}, "
            f"peak {row['peak'] / 1e9:.1f} GB"
        )
    if options.json:
        content = {"versions": versions(), "unit": "bytes", "targets": TARGETS}
        write_json(options.json, {**content, "sampling": drawn, "training": trained})


if __name__ == "__main__":
    main()
