"""``latentlm bench sample``: images per second, ours against a plain loop in the same run.

Instead of the plain loop, it may be the engine of another recipe's network: a DiT of equal size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentlm_core.artifacts import Generator, load_generator
from latentlm_core.config import build
from latentlm_core.errors import ConfigError, LatentLMError
from latentlm_core.export_config import GeneratorExport, read_config
from latentlm_core.models.dit import DiT, DiTConfig
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.sampling import LatentLMEngine, Request, SamplerConfig, make_engine
from latentlm_core.sampling.base import require_fitting
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
from latentlm_core.workflows.bench_loop import class_recipe
from latentlm_core.workflows.bench_models import default_latents, fresh_model, sized_model
from latentlm_core.workflows.bench_plain import plain_sampling
from latentlm_core.workflows.workspace import find_export

Make = Callable[[], Generator]
BenchMode = Literal["auto", "eager", "compile", "graph"]
WeightDtype = Literal["float32", "bfloat16"]
STEPS, GUIDANCE_SCALE = 20, 2.0
"""Of a head that leaves them open; a distilled one has its own."""
PLAIN = "a plain loop"
TOLERANCE = 1e-3
"""Absolute and relative, between ours and the plain loop in float32."""


def bench_sample(
    *,
    model: str | None = None,
    size: str | None = None,
    against: str | None = None,
    batches: Sequence[int] = (1, 64),
    num_latents: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    mode: BenchMode = "auto",
    dtype: WeightDtype = "float32",
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Time the sampling of class-conditional latents against a reference, in turns.

    Args:
        model: run, export or hub id of a generator; by default the newest.
        size: instead, a recipe whose network is built with fresh weights.
        against: instead of ``plain_sampling``, the engine of the network of this recipe.
        batches: how many images are drawn at once, each measured.
        num_latents: T, of a size alone; by default 256 if it is published, else 16.
        num_inference_steps: solver steps per latent; by default 20, or a distilled head's most.
        guidance_scale: 1 is off; by default 2, or a distilled head's.
        mode: how the decode step runs.
        dtype: of the weights, ours and the reference's.
        repeats: rounds that count.
        warm_up: rounds before.
        device: auto, cpu, cuda, ...
        progress: listener.

    Returns:
        images per second, their ratio, memory, and on a GPU the share of what it can reach.

    Raises:
        LatentLMError: anything that the user can mend; a batch of 1 that does not fit among it.
    """
    where = resolve_device(device)
    require_counts(batches, repeats, warm_up)
    if mode == "graph" and where.type != "cuda":
        raise ConfigError(f"--mode graph captures a CUDA graph, and the device is {where}.")
    if size is not None:
        if model is not None:
            raise ConfigError("--model has a size of its own: leave --size out.")
        num_latents = num_latents or default_latents(size)
        complete, make = _fresh(size, num_latents)
    else:
        if num_latents is not None or against is not None:
            raise ConfigError("--latents and --against go with --size.")
        complete, make, num_latents = _trained(find_export(model, "generator", progress))
    rival = None if against is None else _fresh(against, num_latents)
    config = _sampler(complete, num_inference_steps, guidance_scale)
    _require_mode(complete, mode)
    options = {
        "model": model,
        "size": size,
        "against": against,
        "batches": list(batches),
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "mode": mode,
        "dtype": dtype,
        "repeats": repeats,
        "warm_up": warm_up,
    }
    conditions = Conditions(where, options, progress)
    weights = getattr(torch, dtype)

    def placed(make: Make) -> LatentLM | DiT:
        network = make().to(weights).to(where)
        assert isinstance(network, LatentLM | DiT), "a Transfusion has no classes"
        return network

    network, other = placed(make), None if rival is None else placed(rival[1])
    ceilings = Ceilings.measure(where, weights) if where.type == "cuda" else None
    bench = _Bench(network, other, config, num_latents, mode, ceilings, progress)
    rows = each_batch(batches, where, lambda batch: bench.row(batch, repeats, warm_up), progress)
    found = {} if ceilings is None else {"ceilings": ceilings.to_dict()}
    about = {
        "parameters": _count(network),
        "latents": num_latents,
        "steps": config.num_inference_steps,
        "reference": PLAIN if against is None else against,
    }
    if other is not None:
        about["reference_parameters"] = _count(other)
    figures = {f"batch {batch}": _shown(row) for batch, row in rows.items()}
    return conditions.result(
        "Sampling speed", {**about, **figures, **found}, list(rows.values()), **about, **found
    )


class _Bench:
    """One model, what it is held against, and the rows of its table."""

    def __init__(
        self,
        model: LatentLM | DiT,
        rival: LatentLM | DiT | None,
        config: SamplerConfig,
        num_latents: int,
        mode: BenchMode,
        ceilings: Ceilings | None,
        progress: Progress,
    ) -> None:
        self._model, self._rival, self._config = model, rival, config
        self._num_latents, self._mode, self._ceilings = num_latents, mode, ceilings
        self._progress = progress
        weight = model.latent_embedding.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._memory = Memory(weight.device)

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
        reference = self._reference(requests)
        agreement = self._agreement(drawn[0], reference())
        ours, theirs = take_turns(
            (lambda: engine.generate(requests), reference), repeats, warm_up, self._device
        )
        row: dict[str, Any] = {
            "batch": batch,
            "mode": engine.mode if isinstance(engine, LatentLMEngine) else "eager",
            "images_per_second": ours.rates(batch),
            "reference_images_per_second": theirs.rates(batch),
            "ratio": round(theirs.median / ours.median, 3),
            "first_call_seconds": round(first, 2),
            "peak_megabytes": peak,
        }
        return row | agreement | self._bounds(batch, ours.median)

    def _reference(self, requests: Sequence[Request]) -> Callable[[], Tensor]:
        """What draws as many latents as ours."""
        if self._rival is None:
            return lambda: plain_sampling(self._model, requests, self._config)
        engine = make_engine(self._rival, self._config, progress=self._progress)
        return lambda: engine.generate(requests)

    def _agreement(self, drawn: Tensor, wanted: Tensor) -> dict[str, float]:
        """The largest difference of ours and the plain loop's latents.

        Raises:
            LatentLMError: both are float32 and do not agree.
        """
        if self._rival is not None:
            return {}
        difference = float((drawn - wanted).abs().max())
        agrees = torch.allclose(drawn, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        if self._dtype == torch.float32 and not agrees:
            raise LatentLMError(
                f"Ours and the reference drew latents that differ by {difference:.3g}, so their "
                "times do not compare."
            )
        return {"largest_difference": difference}

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


def _fresh(name: str, num_latents: int) -> tuple[LatentLMConfig | DiTConfig, Make]:
    """The network of a recipe of images of classes, and what makes it."""
    config = sized_model(class_recipe(name).model, num_latents)
    return config, lambda: fresh_model(config)


def _trained(export: Path) -> tuple[LatentLMConfig | DiTConfig, Make, int]:
    """The network of an export, what loads it, and T."""
    config = read_config(export, GeneratorExport)
    config.require_classes()
    network = config.model
    assert isinstance(network, LatentLMConfig | DiTConfig), "a Transfusion has no classes"
    return network, lambda: load_generator(export, torch.device("cpu")).model, config.num_latents


def _sampler(
    network: LatentLMConfig | DiTConfig, steps: int | None, scale: float | None
) -> SamplerConfig:
    """How latents are drawn.

    Raises:
        ConfigError: a setting is out of range, or the head was distilled for others.
    """
    few_step = network.few_step if isinstance(network, LatentLMConfig) else None
    own: dict[str, Any]
    if few_step is None:
        own = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    else:
        guidance = few_step.to_dict()
        own = {"num_inference_steps": max(guidance.pop("steps")), "solver": "few-step", **guidance}
    asked = {"num_inference_steps": steps, "guidance_scale": scale}
    given = {name: value for name, value in asked.items() if value is not None}
    config = build(SamplerConfig, own | given, "sampling")
    require_fitting(config, few_step)
    return config


def _require_mode(config: LatentLMConfig | DiTConfig, mode: BenchMode) -> None:
    """Refuse to prepare a decode step that is not there."""
    if isinstance(config, DiTConfig) and mode not in ("auto", "eager"):
        raise ConfigError(f"A DiT has no decode step, so there is no --mode {mode} of it.")


def _count(network: LatentLM | DiT) -> int:
    return sum(part.numel() for part in network.parameters())


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row a person wants to see."""
    rate = row["images_per_second"]
    shown = {
        "images_per_second": rate["median"],
        "spread": f"{rate['min']:.4g} to {rate['max']:.4g}",
        "reference_images_per_second": row["reference_images_per_second"]["median"],
        "ratio": row["ratio"],
        "mode": row["mode"],
        "peak_megabytes": row["peak_megabytes"],
    }
    return shown | ({"share_of_bound": row["share_of_bound"]} if "share_of_bound" in row else {})
