"""Every figure of speed in the README, by the benchmarks that ``latentlm bench`` runs.

    python examples/speed.py [FILE.json]

takes the demo's sizes on the CPU: sampling, eagerly, compiled, and eagerly with bfloat16 weights,
each against a plain eager loop with the same weights in turns, and against a DiT of about its size;
training on cached latents against images that are encoded at every step, reading of shards, and the
tokenizing of drawn shapes and of JPEGs. Two to four minutes.

    python examples/speed.py --gpu [FILE.json] [--minutes 9]

takes LatentLM-L (479M), 256 latents, 20 steps and guidance in bfloat16 on one GPU of 80 GB. It was
never run: times are counted. The plain loop launches 2,600 kernels a token, so at 10 us each one of
its rounds takes 7 s at any batch, and all of it 7 to 10 minutes, of which making networks is one
and compiling two. Parts stand in the order of their worth. The file is written after each, one that
fails is told and leaves the others alone, and those that would begin after the minutes are named.
"""

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from latentlm_core.artifacts import TokenizerExport, save_tokenizer
from latentlm_core.data.caching import encode_source
from latentlm_core.data.sources import open_source
from latentlm_core.errors import ConfigError
from latentlm_core.files import write_json
from latentlm_core.progress import Progress, SilentProgress
from latentlm_core.recipes import vae_recipe
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.workflows import bench_load, bench_sample, bench_tokenize, bench_train

DATA, RECIPE = "embedded:shapes", "mnist"
MINUTES = 9.0
AGREEMENT_STEPS = 8
"""Solver steps where all ways are compared: compiled for a GPU, each costs some seconds."""


@dataclass(frozen=True, slots=True)
class Part:
    """A measurement.

    Attributes:
        name: of it.
        work: measures, and tells a listener.
        aims: what figures of its first row are to reach.
    """

    name: str
    work: Callable[[Progress], Result]
    aims: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured on a GPU; the tests take small ones, on a CPU.

    Attributes:
        model: recipe of the LatentLM.
        rival: recipe of a DiT as large.
        num_latents: T.
        tokenizer: makes so many latents of an image.
        batches: of sampling, with how many times the plain loop's speed each is to reach.
        rival_batches: of both, with the paper's ratio.
        training_batch: sequences a step.
        training: what changes the recipe, by what that is called.
        modes: whose latents are compared.
        dtype: of the weights in sampling.
        device: where.
        rounds: that count.
        image_recipe: of the sigma-VAE that JPEGs are encoded with.
        num_pictures: of these.
    """

    model: str = "latentlm-l"
    rival: str = "dit-medium"
    num_latents: int = 256
    tokenizer: SigmaVAEConfig = field(
        default_factory=lambda: SigmaVAEConfig(
            latent_channels=16, network=ConvConfig(channels=(32,), stem_patch_size=2)
        )
    )
    batches: Mapping[int, int] = field(default_factory=lambda: {64: 5, 1: 15, 256: 2})
    rival_batches: Mapping[int, float] = field(default_factory=lambda: {256: 2.84, 128: 2.47})
    training_batch: int = 64
    training: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {
            "compiled": ("trainer.compile=true",),
            "eager": (),
            "blocks computed twice": ("trainer.recompute=true",),
        }
    )
    modes: Sequence[str] = ("eager", "graph", "compile")
    dtype: str = "bfloat16"
    device: str = "cuda"
    rounds: int = 3
    image_recipe: str = "imagenet"
    num_pictures: int = 512


class Notes(SilentProgress):
    """Keeps what a part warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Keep it, and show it."""
        self.warnings.append(message)
        print(f"  ! {message}", flush=True)


def on_a_processor(folder: Path) -> list[Part]:
    """The demo's sizes."""

    def sampling(name: str, **options: Any) -> Part:
        shared = {"size": RECIPE, "device": "cpu", "mode": "eager"} | options
        return Part(f"sampling, {name}", lambda heard: bench_sample(**shared, progress=heard))

    data, shared = str(folder / "latents"), {"recipe": RECIPE, "device": "cpu"}
    make_latents(folder, vae_recipe(RECIPE).tokenizer)
    pictures = str(make_pictures(folder / "pictures", 256))
    return [
        sampling("eager"),
        sampling("compiled", mode="compile", repeats=3),
        sampling("eager, bfloat16", dtype="bfloat16", repeats=3),
        sampling("against a DiT", against="dit-mnist", repeats=3),
        Part("training", lambda heard: bench_train(data=data, encode=True, steps=2, **shared)),
        Part("reading", lambda heard: bench_load(data=data, steps=2, repeats=3, **shared)),
        Part("tokenizing", lambda heard: bench_tokenize(data=DATA, **shared)),
        Part("tokenizing JPEGs", lambda heard: bench_tokenize(data=pictures, **shared)),
    ]


def on_a_gpu(folder: Path, sizes: Sizes) -> list[Part]:
    """The table of the aims: first whether all ways draw the same, then what is worth most."""
    shared: dict[str, Any] = {"device": sizes.device, "repeats": sizes.rounds}
    sampled = shared | {"num_latents": sizes.num_latents, "warm_up": 0}

    def agreement(mode: str) -> Part:
        return Part(
            f"latents in float32, {mode}",
            lambda heard: bench_sample(
                size="tiny",
                batches=(4,),
                num_inference_steps=AGREEMENT_STEPS,
                mode=mode,
                warm_up=0,
                progress=heard,
                **shared,
            ),
            {"largest_difference": "at most 1e-4", "mode": mode},
        )

    def sampling(
        batch: int, against: str | None, aims: Mapping[str, str], mode: str = "auto"
    ) -> Part:
        words = [f"against {against}"] * (against is not None) + [mode] * (mode != "auto")
        return Part(
            ", ".join([f"sampling, batch {batch}", *words]),
            lambda heard: bench_sample(
                size=sizes.model,
                against=against,
                batches=(batch,),
                dtype=sizes.dtype,
                mode=mode,
                progress=heard,
                **sampled,
            ),
            aims,
        )

    def training(name: str, overrides: Sequence[str]) -> Part:
        return Part(
            f"training, {name}",
            lambda heard: bench_train(
                recipe=sizes.model,
                overrides=overrides,
                batches=(sizes.training_batch,),
                num_latents=sizes.num_latents,
                steps=5,
                progress=heard,
                **shared,
            ),
            {"flops_utilisation": "at least 0.5", "peak_megabytes": "at most 40000"},
        )

    def reading(heard: Progress) -> Result:
        make_latents(folder, sizes.tokenizer, crops=2, flip=True, device=sizes.device)
        return bench_load(
            data=str(folder / "latents"),
            recipe=sizes.model,
            batch_size=sizes.training_batch,
            steps=5,
            progress=heard,
            **shared,
        )

    def tokenizing(heard: Progress) -> Result:
        pictures = make_pictures(folder / "pictures", sizes.num_pictures)
        return bench_tokenize(
            data=str(pictures), recipe=sizes.image_recipe, progress=heard, **shared
        )

    bounds = {"share_of_bound": "at least 0.5", "peak_megabytes": "at most 8000 with 64"}
    agreements, trainings = [agreement(mode) for mode in sizes.modes], list(sizes.training.items())
    return [
        *agreements[:-1],
        *(sampling(n, None, {"ratio": f"at least {k}"} | bounds) for n, k in sizes.batches.items()),
        agreements[-1],
        sampling(1, None, {"ratio": "at least 15"} | bounds, sizes.modes[-1]),
        *(
            sampling(n, sizes.rival, {"ratio": f"at least {k}"})
            for n, k in sizes.rival_batches.items()
        ),
        *(training(*each) for each in trainings[:2]),
        Part("reading", reading, {"data_wait_share": "under 0.02"}),
        Part("tokenizing JPEGs", tokenizing, {"share_of_slowest": "near 1"}),
        *(training(*each) for each in trainings[2:]),
    ]


def make_latents(folder: Path, config: SigmaVAEConfig, **options: Any) -> None:
    """A latent set by a tokenizer with fresh weights."""
    vae = build_tokenizer(config)
    save_tokenizer(folder / "vae", vae, TokenizerExport(tokenizer=config))
    encode_source(
        open_source(DATA),
        vae,
        folder / "latents",
        spec=DATA,
        split="train",
        tokenizer_export=folder / "vae",
        **options,
    )


def make_pictures(folder: Path, count: int) -> Path:
    """JPEGs of 256 to 512 pixels a side: smooth colours under a little noise."""
    folder.mkdir()
    for index in range(count):
        source = np.random.default_rng(index)
        width, height = source.integers(256, 513, 2).tolist()
        colours = PIL.Image.fromarray(source.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((width, height), PIL.Image.Resampling.BICUBIC))
        noise = source.integers(0, 24, smooth.shape, dtype=np.uint8)
        PIL.Image.fromarray(smooth // 2 + noise).save(folder / f"{index:04d}.jpg", quality=90)
    return folder


def measure(parts: Sequence[Part], file: Path | None, minutes: float) -> dict[str, Any]:
    """Run the parts, print a line for each, and write what is known after each.

    Args:
        parts: in the order of their worth.
        file: what to write, if anything.
        minutes: after which no other part is begun.

    Returns:
        of each part its result or why there is none; those that were left out under ``skipped``.
    """
    report: dict[str, Any] = {}
    begun = time.monotonic()
    for place, part in enumerate(parts):
        if time.monotonic() - begun > 60 * minutes:
            report["skipped"] = [left.name for left in parts[place:]]
            print(f"No time for: {', '.join(report['skipped'])}.", flush=True)
        else:
            report[part.name] = _measured(part)
        if file is not None:
            write_json(file, report)
        if "skipped" in report:
            break
    return report


def _measured(part: Part) -> dict[str, Any]:
    """The result of a part, or why there is none."""
    gc.collect()  # what a failed part left
    notes, begun = Notes(), time.monotonic()
    try:
        result = part.work(notes)
    except Exception as error:  # whatever it is: the other parts are worth having
        found: dict[str, Any] = {"error": str(error), "traceback": traceback.format_exc()}
        told = f"failed: {error}"
    else:
        found = {"aims": dict(part.aims), **result.to_dict()}
        told = ", ".join(_shown(part, row) for row in result.details["rows"])
    seconds = round(time.monotonic() - begun, 1)
    print(f"{part.name} ({seconds:g} s): {told}", flush=True)
    return {"seconds": seconds, "warnings": notes.warnings, **found}


def _shown(part: Part, row: Mapping[str, Any]) -> str:
    """A row in a line: medians of its rates, and of its figures what they are to reach."""
    told = []
    for name, value in row.items():
        value = value.get("median", value) if isinstance(value, dict) else value
        aim = f" ({part.aims[name]})" if name in part.aims else ""
        told.append(f"{name} {value}{aim}")
    return ", ".join(told)


def main(words: Sequence[str]) -> int:
    """Print what was measured, and write it where a file is named; 1 if something failed."""
    parser = argparse.ArgumentParser(description="Every figure of speed in the README.")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.json")
    parser.add_argument("--gpu", action="store_true", help="LatentLM-L on a GPU, not the demo's")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="after which no other part is begun"
    )
    asked = parser.parse_args(words)
    if asked.gpu:
        try:
            resolve_device("cuda")
        except ConfigError as error:
            parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parts = on_a_gpu(folder, Sizes()) if asked.gpu else on_a_processor(folder)
        report = measure(parts, asked.file, asked.minutes)
    return int(any("error" in found for found in report.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
