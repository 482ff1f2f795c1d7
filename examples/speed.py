"""Every figure of speed in the README, by the benchmarks that ``latentlm bench`` runs.

Sampling at the demo's sizes, eagerly, compiled, and eagerly with bfloat16 weights, each against a
plain eager loop with the same weights in turns. Training on cached latents against images that are
encoded at every step, reading of shards, and the stages of tokenizing. A few minutes at most.

    python examples/speed.py [FILE.json]

On a GPU, ``--gpu`` takes LatentLM-L and a DiT of its size in bfloat16 instead (not run yet).
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentlm_core.artifacts import TokenizerExport, save_tokenizer
from latentlm_core.data.caching import encode_source
from latentlm_core.data.sources import open_source
from latentlm_core.files import write_json
from latentlm_core.recipes import vae_recipe
from latentlm_core.result import Result
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.workflows import bench_load, bench_sample, bench_tokenize, bench_train

DATA, RECIPE = "embedded:shapes", "mnist"


def make_latents(folder: Path) -> Path:
    """A latent set by a tokenizer of the demo's size with fresh weights."""
    config = vae_recipe(RECIPE).tokenizer
    vae = build_tokenizer(config)
    save_tokenizer(folder / "vae", vae, TokenizerExport(tokenizer=config))
    encode_source(
        open_source(DATA),
        vae,
        folder / "latents",
        spec=DATA,
        split="train",
        tokenizer_export=folder / "vae",
    )
    return folder / "latents"


def on_a_processor(folder: Path) -> Iterator[tuple[str, Result]]:
    """The demo's sizes."""
    yield "sampling, eager", bench_sample(size=RECIPE, mode="eager", device="cpu")
    yield "sampling, compiled", bench_sample(size=RECIPE, mode="compile", device="cpu", repeats=3)
    yield (
        "sampling, eager, bfloat16",
        bench_sample(size=RECIPE, mode="eager", dtype="bfloat16", device="cpu", repeats=3),
    )
    data = str(make_latents(folder))
    yield "training", bench_train(recipe=RECIPE, data=data, encode=True, steps=2, device="cpu")
    yield "reading", bench_load(data=data, recipe=RECIPE, steps=2, repeats=3, device="cpu")
    yield "tokenizing", bench_tokenize(recipe=RECIPE, data=DATA, device="cpu")


def on_a_gpu() -> Iterator[tuple[str, Result]]:
    """LatentLM-L (479M) and a DiT, 256 latents, 20 steps; the plain loop is slow: three rounds."""
    shared: dict[str, Any] = {"dtype": "bfloat16", "device": "cuda", "repeats": 3}
    for size, batches in (("latentlm-l", (1, 64, 128, 256)), ("dit-medium", (128, 256))):
        yield f"sampling, {size}", bench_sample(size=size, batches=batches, warm_up=0, **shared)
    yield "training", bench_train(recipe="latentlm-l", batches=(64,), device="cuda")


def main(words: list[str]) -> None:
    """Print what was measured, and write it where a file is named."""
    report = {}
    with tempfile.TemporaryDirectory() as scratch:
        for what, result in on_a_gpu() if "--gpu" in words else on_a_processor(Path(scratch)):
            print(what, result.figures, flush=True)
            report[what] = result.to_dict()
    for path in (word for word in words if word != "--gpu"):
        write_json(Path(path), report)


if __name__ == "__main__":
    main(sys.argv[1:])
