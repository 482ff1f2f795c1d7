"""``latentlm bench sample``: images per second, ours against a plain loop in the same run."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentlm_core.artifacts import build_generator, load_generator
from latentlm_core.errors import ConfigError, LatentLMError
from latentlm_core.models.dit import DiT, DiTConfig, DiTSize
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig, LatentLMSize
from latentlm_core.models.transfusion import TransfusionSize
from latentlm_core.progress import SILENT, Progress
from latentlm_core.recipes import lm_recipe
from latentlm_core.recipes.sizes import PUBLISHED_SIZES
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device, seeded_init
from latentlm_core.sampling import LatentLMEngine, Request, SamplerConfig, make_engine
from latentlm_core.workflows.bench import (
    Ceilings,
    Conditions,
    Memory,
    each_batch,
    require_counts,
    take_turns,
    timed,
)
from latentlm_core.workflows.bench_cost import sampling_cost
from latentlm_core.workflows.bench_plain import plain_sampling
from latentlm_core.workflows.workspace import find_export

BenchMode = Literal["auto", "eager", "compile", "graph"]
WeightDtype = Literal["float32", "bfloat16"]
PUBLISHED_LATENTS, SMALL_LATENTS = 256, 16
"""T of a size that is published, and of any other."""
CHANNELS, CLASSES = 16, 1000
"""Of a model that is built for its speed alone."""
TOLERANCE = 1e-3
"""Absolute and relative, between ours and the reference in float32."""


def bench_sample(
    *,
    model: str | None = None,
    size: str | None = None,
    batches: Sequence[int] = (1, 64),
    num_latents: int | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    mode: BenchMode = "auto",
    dtype: WeightDtype = "float32",
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Time the sampling of class-conditional latents against ``plain_sampling``.

    Args:
        model: run, export or hub id of a generator; by default the newest.
        size: instead, a recipe whose network is built with fresh weights.
        batches: how many images are drawn at once, each measured.
        num_latents: T, of a size alone; by default 256 if it is published, else 16.
        num_inference_steps: solver steps per latent.
        guidance_scale: 1 is off.
        mode: how the decode step runs.
        dtype: of the weights, ours and the reference's.
        repeats: rounds that count.
        warm_up: rounds before.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        images per second, their ratio, memory, and on a GPU the share of what it can reach.

    Raises:
        LatentLMError: anything that the user can mend; a batch that does not fit among it.
    """
    where = resolve_device(device)
    require_counts(batches, repeats, warm_up)
    if model is not None and (size is not None or num_latents is not None):
        raise ConfigError("--model has a size of its own: leave --size and --latents out.")
    if model is None and size is None and num_latents is not None:
        raise ConfigError("--latents goes with --size; a model that was trained knows its own.")
    if mode == "graph" and where.type != "cuda":
        raise ConfigError(f"--mode graph captures a CUDA graph, and the device is {where}.")
    config = SamplerConfig(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    options = {
        "model": model,
        "size": size,
        "batches": list(batches),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "mode": mode,
        "dtype": dtype,
        "repeats": repeats,
        "warm_up": warm_up,
    }
    complete = None
    if size is not None:
        num_latents = num_latents or default_latents(size)
        complete = sized_model(lm_recipe(size).model, num_latents)
        _require_mode(complete, mode)
    conditions = Conditions(where, options, progress)
    memory = Memory(where)
    if complete is None or num_latents is None:
        network, num_latents = _load(model, where, mode, progress)
    else:
        network = fresh_model(complete)
    network = network.to(where, getattr(torch, dtype))
    ceilings = Ceilings.measure(where, getattr(torch, dtype)) if where.type == "cuda" else None
    bench = _Bench(network, config, num_latents, mode, memory, ceilings, progress)
    rows = each_batch(batches, where, lambda batch: bench.row(batch, repeats, warm_up))
    figures = {f"batch {batch}": _shown(row) for batch, row in rows.items()}
    found = {} if ceilings is None else {"ceilings": ceilings.to_dict()}
    about = {
        "parameters": sum(part.numel() for part in network.parameters()),
        "latents": num_latents,
    }
    return conditions.result(
        "Sampling speed", {**about, **figures, **found}, list(rows.values()), **about, **found
    )


def sized_model(
    size: LatentLMSize | TransfusionSize | DiTSize, num_latents: int
) -> LatentLMConfig | DiTConfig:
    """The class-conditional model of a size.

    Args:
        size: of a recipe.
        num_latents: T, a square number.

    Raises:
        ConfigError: it is of other data, or T is not square.
    """
    if isinstance(size, TransfusionSize):
        raise ConfigError("A Transfusion takes text and images; benchmarks take images of classes.")
    side = math.isqrt(num_latents)
    if side * side != num_latents or not num_latents:
        raise ConfigError(
            f"--latents is the number of a square grid, such as 16 or 256, not {num_latents}."
        )
    return size.complete((side, side), CHANNELS, CLASSES + 1)


def default_latents(name: str) -> int:
    """T of a size where nobody says it."""
    return PUBLISHED_LATENTS if name in PUBLISHED_SIZES else SMALL_LATENTS


def fresh_model(config: LatentLMConfig | DiTConfig) -> LatentLM | DiT:
    """A network with random weights, none of them all zero: those would hide a difference."""
    with seeded_init("bench"):
        model = build_generator(config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    assert isinstance(model, LatentLM | DiT)
    return model


class _Bench:
    """One model, and the rows of its table."""

    def __init__(
        self,
        model: LatentLM | DiT,
        config: SamplerConfig,
        num_latents: int,
        mode: BenchMode,
        memory: Memory,
        ceilings: Ceilings | None,
        progress: Progress,
    ) -> None:
        self._model, self._config, self._num_latents = model, config, num_latents
        self._mode, self._memory, self._ceilings = mode, memory, ceilings
        self._progress = progress
        weight = model.latent_embedding.weight
        self._device, self._dtype = weight.device, weight.dtype

    def row(self, batch: int, repeats: int, warm_up: int) -> dict[str, Any]:
        """Measure a batch."""
        model, config = self._model, self._config
        null = model.config.vocab_size - 1
        requests = [
            Request((index % max(null, 1),), (null,), self._num_latents, index)
            for index in range(batch)
        ]
        engine = make_engine(model, config, self._mode, progress=self._progress)
        self._memory.restart()
        drawn: list[Tensor] = []
        first = timed(lambda: drawn.append(engine.generate(requests)), self._device)
        peak = self._memory.peak_megabytes
        wanted = plain_sampling(model, requests, config)
        difference = self._compare(drawn[0], wanted)
        ours, plain = take_turns(
            (
                lambda: engine.generate(requests),
                lambda: plain_sampling(model, requests, config),
            ),
            repeats,
            warm_up,
            self._device,
        )
        row: dict[str, Any] = {
            "batch": batch,
            "mode": engine.mode if isinstance(engine, LatentLMEngine) else "eager",
            "images_per_second": ours.rates(batch),
            "reference_images_per_second": plain.rates(batch),
            "ratio": round(plain.median / ours.median, 3),
            "first_call_seconds": round(first, 2),
            "peak_megabytes": peak,
            "largest_difference": difference,
        }
        return row | self._bounds(batch, ours.median)

    def _compare(self, drawn: Tensor, wanted: Tensor) -> float:
        """The largest difference of some latents.

        Raises:
            LatentLMError: both are float32 and do not agree.
        """
        difference = float((drawn - wanted).abs().max())
        agrees = torch.allclose(drawn, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        if self._dtype == torch.float32 and not agrees:
            raise LatentLMError(
                f"Ours and the reference drew latents that differ by {difference:.3g}, so their "
                "times do not compare."
            )
        return difference

    def _bounds(self, batch: int, seconds: float) -> dict[str, Any]:
        """What a GPU's arithmetic and memory take for a batch, and the share that is reached."""
        if self._ceilings is None:
            return {}
        config = self._config
        cost = sampling_cost(
            self._model.config,
            batch,
            self._num_latents,
            config.num_inference_steps,
            config.is_guided,
        )
        bounds = cost.bound_seconds(self._ceilings, self._dtype.itemsize)
        return {
            "seconds": seconds,
            "bound_seconds": bounds,
            "share_of_bound": round(max(bounds.values()) / seconds, 4),
        }


def _load(
    name: str | None, device: torch.device, mode: BenchMode, progress: Progress
) -> tuple[LatentLM | DiT, int]:
    """A generator that was trained, and its T."""
    loaded = load_generator(find_export(name, "generator", progress), device)
    loaded.config.require_classes()
    network = loaded.model
    assert isinstance(network, LatentLM | DiT), "a Transfusion has no classes"
    _require_mode(network.config, mode)
    return network, loaded.config.num_latents


def _require_mode(config: LatentLMConfig | DiTConfig, mode: BenchMode) -> None:
    """Refuse what is not compared with the reference, or not in this mode."""
    if isinstance(config, DiTConfig):
        if mode not in ("auto", "eager"):
            raise ConfigError(f"A DiT has no decode step, so there is no --mode {mode} of it.")
    elif config.few_step is not None:
        raise ConfigError("A distilled head has no plain loop to be compared with.")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row a person wants to see."""
    rate = row["images_per_second"]
    shown = {
        "images_per_second": rate["median"],
        "spread": f"{rate['min']:.4g} to {rate['max']:.4g}",
        "reference": row["reference_images_per_second"]["median"],
        "ratio": row["ratio"],
        "mode": row["mode"],
        "peak_megabytes": row["peak_megabytes"],
    }
    return shown | ({"share_of_bound": row["share_of_bound"]} if "share_of_bound" in row else {})
