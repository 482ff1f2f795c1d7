"""Speed of sampling and training against a plain eager loop, as ratios in one run.

The plain loop does what the published code does. Sampling: a cache that grows by concatenation, a
scheduler built anew for every token, timesteps embedded at every solver step. Ours is measured
eagerly, compiled, and eagerly with bfloat16 weights, whose latents agree loosely. Training: images
encoded at every step, where ours reads cached latents; forward, backward and update are the same
on both sides. Both use the same weights and the demo's sizes, and take turns.

    python examples/speed.py [FILE.json]
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentlm_core.artifacts import TokenizerExport, build_generator, save_tokenizer
from latentlm_core.data.caching import encode_source
from latentlm_core.data.packing import LatentStream
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.sources import open_source
from latentlm_core.data.stream import MediaStream
from latentlm_core.diffusion import NoiseSchedule, solve, solver_grid
from latentlm_core.draws import Draws
from latentlm_core.files import write_json
from latentlm_core.layout import AttentionMask, SequenceLayout
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.recipes import lm_recipe, vae_recipe
from latentlm_core.runtime import evaluating, generator, machine, versions
from latentlm_core.sampling import LatentLMEngine, Request, SamplerConfig, draw_noise
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.training.hardware import autocast_dtype

CPU = torch.device("cpu")
REPEATS = 5
STEPS, SCALE, NUM_LATENTS = 20, 2.0, 16


class GrowingCache:
    """Keys and values that are copied at every token."""

    def __init__(self) -> None:
        self.length = 0
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate."""
        if layer in self.stored:
            old_key, old_value = self.stored[layer]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        self.stored[layer] = (key, value)
        return key, value

    def advance(self, num_positions: int) -> None:
        """Count."""
        self.length += num_positions

    def positions(self, num_new: int) -> Tensor:
        """Rotary positions of the next inputs."""
        return torch.arange(self.length, self.length + num_new).unsqueeze(0)

    def mask(self, num_new: int) -> AttentionMask:
        """All that is stored is seen."""
        return AttentionMask(is_causal=num_new > 1)


def plain_sampling(model: LatentLM, requests: list[Request]) -> Tensor:
    """The loop that the engine replaces."""
    noise = draw_noise(requests, model.config.latent_channels, 0).start
    ids = torch.tensor([r.prompt for r in requests] + [r.unconditional for r in requests])
    cache: Any = GrowingCache()
    drawn = []
    with evaluating(model):
        x = model.token_embedding(ids)
        for i in range(NUM_LATENTS):
            condition = model.head.condition(model.step(x, cache))
            grid = solver_grid(NoiseSchedule(model.config.head.diffusion), STEPS, "dpmsolver++")

            def predict(x_t: Tensor, step: int, grid: Any = grid, condition: Any = condition):
                t = torch.full((2 * len(x_t),), grid.timesteps[step])
                guided, free = model.head(torch.cat([x_t, x_t]), t, condition).chunk(2)
                return free + SCALE * (guided - free)

            latent = solve(predict, noise[:, i], grid)
            drawn.append(latent)
            x = model.latent_embedding(latent.repeat(2, 1)).unsqueeze(1)
    return torch.stack(drawn, 1)


def median_seconds(*works: Callable[[], Any]) -> list[float]:
    """Of some repeats of each, in turns, after one of each to warm up."""
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(REPEATS + 1):
        for work, own in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if repeat:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def sampling_rows() -> list[dict[str, Any]]:
    """Images per second, batch 1 and 64; all loops in float32 draw the same latents."""
    model = build_generator(lm_recipe("mnist").model.complete((4, 4), 16, 11))
    for parameter in model.parameters():
        if not parameter.any():  # a fresh head outputs zero, which would hide a difference
            torch.nn.init.normal_(parameter, std=0.02)
    half = deepcopy(model).bfloat16()
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=SCALE)
    rows = []
    for batch in (1, 64):
        requests = [Request((i % 10,), (10,), NUM_LATENTS, i) for i in range(batch)]
        engines = {
            "eager": LatentLMEngine(model, config, "eager"),
            "compile": LatentLMEngine(model, config, "compile"),
            "eager, bfloat16": LatentLMEngine(half, config, "eager"),
        }
        wanted = plain_sampling(model, requests)
        for name, engine in engines.items():
            loose = 0.1 if "bfloat16" in name else 1e-4
            begun = time.perf_counter()
            torch.testing.assert_close(engine.generate(requests), wanted, rtol=1e-3, atol=loose)
            if name == "compile":
                compiling = round(time.perf_counter() - begun, 1)
        plain, *ours = median_seconds(
            lambda r=requests: plain_sampling(model, r),
            *(lambda e=engine, r=requests: e.generate(r) for engine in engines.values()),
        )
        for name, seconds in zip(engines, ours, strict=True):
            row = _row(f"sampling, batch {batch}, {name}", batch / seconds, batch / plain)
            rows.append(row | ({"compile_seconds": compiling} if name == "compile" else {}))
    return rows


def training_row(folder: Path) -> dict[str, Any]:
    """Images per second of forward, backward and update, on cached latents and on images."""
    recipe, vae_config = lm_recipe("mnist"), vae_recipe("mnist").tokenizer
    vae = build_tokenizer(vae_config)
    save_tokenizer(folder / "vae", vae, TokenizerExport(tokenizer=vae_config))
    source, batch = open_source("embedded:shapes"), recipe.data.batch_size
    encode_source(
        source,
        vae,
        folder / "latents",
        spec="embedded:shapes",
        split="train",
        tokenizer_export=folder / "vae",
    )
    latents = LatentSet.open(folder / "latents")
    stream = LatentStream(latents, recipe.data, 0)
    model = build_generator(recipe.model.complete((4, 4), 16, stream.null_id + 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    cached = stream.batches(count())
    images = MediaStream(source, 32, batch, 0).batches(count())
    layout = SequenceLayout.of_images(batch, NUM_LATENTS)

    def update(ids: Tensor, z: Tensor, layout: SequenceLayout) -> None:
        with torch.autocast("cpu", autocast_dtype("auto", CPU)):
            loss = model(ids, z, layout, Draws(generator("speed"))).latent.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours() -> None:
        ready = next(cached)
        update(ready.ids, ready.latents, ready.layout)

    def plain() -> None:
        media = next(images)
        with torch.no_grad():
            z = stream.stats.normalise(vae.encode(media.media).sample(Draws(generator("speed"))))
        ids = torch.zeros(batch, NUM_LATENTS + 1, dtype=torch.int64)
        update(ids, torch.cat([torch.zeros_like(z[:, :1]), z], 1), layout)

    ours_seconds, plain_seconds = median_seconds(ours, plain)
    return _row("training, batch 64", batch / ours_seconds, batch / plain_seconds)


def _row(what: str, ours: float, plain: float) -> dict[str, Any]:
    return {
        "what": what,
        "ours_per_second": round(ours, 2),
        "plain_per_second": round(plain, 2),
        "ratio": round(ours / plain, 2),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rows = [*sampling_rows(), training_row(Path(scratch))]
    report = {"machine": machine(), "versions": versions(), "repeats": REPEATS, "rows": rows}
    report["load"] = [round(value, 1) for value in os.getloadavg()]
    for row in rows:
        print(row)
    if len(sys.argv) > 1:
        write_json(Path(sys.argv[1]), report)
