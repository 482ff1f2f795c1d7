"""Training steps to be timed: those of the trainer, without logs and checkpoints.

Latents come from a latent set, from images that are encoded as they come, or are drawn once and
given again and again.

Axes: B sequences, T latent positions, C latent channels.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import count, repeat

import torch
from torch import Tensor

from latentlm_core.artifacts import build_generator, load_tokenizer
from latentlm_core.data.packing import LatentDataConfig, LatentStream, SequenceBatch
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.sources import open_source
from latentlm_core.data.stream import MediaStream
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError
from latentlm_core.files import TOKENIZER_FOLDER
from latentlm_core.layout import SequenceLayout
from latentlm_core.models.dit import DiT, DiTConfig, DiTSize
from latentlm_core.models.latent_lm import LatentLM, LatentLMConfig, LatentLMSize
from latentlm_core.progress import Progress
from latentlm_core.recipes import LMRecipe, lm_recipe
from latentlm_core.runtime import generator, seeded_init
from latentlm_core.training.feed import made_ahead, steps_ahead
from latentlm_core.training.hardware import (
    autocast_dtype,
    compile_blocks,
    keep_freed_memory,
    recompute_blocks,
    require_compiler,
)
from latentlm_core.training.lm_task import DiTTask, LMTask
from latentlm_core.training.optim import Ema
from latentlm_core.training.step import Stepper
from latentlm_core.workflows.bench import Timing, take_turns
from latentlm_core.workflows.bench_models import CHANNELS, CLASSES
from latentlm_core.workflows.workspace import find_latents

RECIPE = "mnist"
"""What is trained where nobody says it: the demo's."""


class TrainingLoop:
    """Steps of one model.

    Args:
        size: of the model.
        recipe: how it is trained.
        device: where.
        batches: on the device.

    Attributes:
        waited: seconds until batches were there.
    """

    def __init__(
        self,
        size: LatentLMConfig | DiTConfig,
        recipe: LMRecipe,
        device: torch.device,
        batches: Iterator[SequenceBatch],
    ) -> None:
        config = recipe.trainer
        if config.compile:
            require_compiler()
        keep_freed_memory(device)
        with seeded_init("generator", config.seed):
            model = build_generator(size)
        if config.recompute:
            recompute_blocks(model)
        if config.compile:
            compile_blocks(model)
        model.to(device).train()
        assert isinstance(model, LatentLM | DiT)
        self._task = (
            DiTTask(model, recipe.loss) if isinstance(model, DiT) else LMTask(model, recipe.loss)
        )
        self._stepper = Stepper(
            {"model": model},
            {"model": recipe.optimizer},
            total_steps=config.total_steps,
            seed=config.seed,
            device=device,
            dtype=autocast_dtype(config.precision, device),
        )
        self._ema = Ema(model, config.ema_decay)
        self._batches = batches
        self.waited = 0.0

    def run(self, steps: int) -> None:
        """Train some steps; schedules stay where they begin."""
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(self._batches)
            self.waited += time.perf_counter() - before
            self._stepper.step(self._task.turns(0), [batch], 0)
            self._ema.update(0)


def time_loops(
    loops: Sequence[TrainingLoop], steps: int, repeats: int, warm_up: int, device: torch.device
) -> tuple[list[float], list[Timing]]:
    """Time some steps of each loop, in turns.

    Returns:
        of each loop the share of its time that it waited for data, and how long the steps took.
    """
    for loop in loops:
        for _ in range(max(warm_up, 1)):  # the first step makes the optimizer's state
            loop.run(steps)
        loop.waited = 0.0
    timings = take_turns(
        [lambda loop=loop: loop.run(steps) for loop in loops],  # type: ignore[misc]
        repeats,
        0,
        device,
    )
    shares = [
        round(loop.waited / sum(timing.seconds), 5)
        for loop, timing in zip(loops, timings, strict=True)
    ]
    return shares, timings


def stored_batches(
    latents: LatentSet | None,
    recipe: LMRecipe,
    batch: int,
    num_latents: int,
    device: torch.device,
) -> Iterator[SequenceBatch]:
    """Endless batches of a latent set, or one that was drawn, again and again.

    They get to the device as a trainer's do (``training.feed``).
    """
    if latents is None:
        drawn = torch.randn(batch, num_latents, CHANNELS, generator=generator("bench"))
        batches: Iterator[SequenceBatch] = repeat(_sequences(drawn, CLASSES))
    else:
        assert isinstance(recipe.data, LatentDataConfig)
        config = recipe.data.model_copy(update={"batch_size": batch})
        batches = LatentStream(latents, config, recipe.trainer.seed).batches(count())
    return made_ahead(lambda: next(batches).to(device), steps_ahead(device))


def encoded_batches(
    latents: LatentSet, batch: int, device: torch.device
) -> Iterator[SequenceBatch]:
    """Endless batches on the device whose images are encoded as they come."""
    manifest = latents.manifest
    vae = load_tokenizer(latents.folder / TOKENIZER_FOLDER, device).model
    source = open_source(manifest.data, manifest.split)
    stats, draws = manifest.stats(latents.posterior), Draws(generator("bench", device=device))
    images = MediaStream(source, vae.image_size, batch, 0)
    for media in images.batches(count()):
        with torch.no_grad():
            raw = vae.encode(media.media.to(device)).sample(draws)
        yield _sequences(stats.normalise(raw), len(manifest.classes))


def _sequences(latents: Tensor, num_classes: int) -> SequenceBatch:
    """Sequences of normalised latents (B, T, C) without a class, on the device of these."""
    batch, num_latents = latents.shape[:2]
    ids = torch.zeros(batch, num_latents + 1, dtype=torch.int64, device=latents.device)
    ids[:, 0] = num_classes
    return SequenceBatch(
        ids,
        torch.cat([torch.zeros_like(latents[:, :1]), latents], 1),
        SequenceLayout.of_images(batch, num_latents).to(latents.device),
        ("",) * batch,
    )


def class_recipe(name: str, overrides: Sequence[str] = ()) -> LMRecipe:
    """A recipe of images of classes.

    Raises:
        ConfigError: there is none of that name, or it is of other data.
    """
    config = lm_recipe(name, overrides)
    if not isinstance(config.data, LatentDataConfig):
        raise ConfigError(f"{name} is not of images of classes, which is what is measured.")
    return config


def open_latents(spec: str | None, progress: Progress) -> LatentSet:
    """A latent set of images, not hashed.

    Raises:
        LatentLMError: it is not there, cannot be used, or is of speech.
    """
    latents = LatentSet.open(find_latents(spec, progress), verify=False)
    if latents.is_ragged:
        raise ConfigError(
            f"{latents.manifest.name} holds speech, and benchmarks take images of classes."
        )
    return latents


def model_of(recipe: LMRecipe, latents: LatentSet) -> LatentLMConfig | DiTConfig:
    """The model of a recipe for some latents."""
    manifest, size = latents.manifest, recipe.model
    assert isinstance(size, LatentLMSize | DiTSize), "a Transfusion is of other data"
    return size.complete(manifest.fixed_grid, manifest.latent_channels, len(manifest.classes) + 1)
