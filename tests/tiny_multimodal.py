"""A folder of shapes, and a workspace in which tiny models have learned to read and draw them."""

import json
from pathlib import Path
from typing import Any

from latentlm_core import workflows
from latentlm_core.artifacts import save_tokenizer
from latentlm_core.data.embedded import ShapesSource
from latentlm_core.data.media import write_png
from latentlm_core.export_config import TokenizerExport
from latentlm_core.files import write_json, write_text
from latentlm_core.result import Result
from latentlm_core.runtime import seeded_init
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from tests.tiny_latents import NETWORK

NUM_LATENTS = 4
"""Of an image of 16x16."""
ROW_LENGTH = 96
NUM_IMAGES = {"train": 30, "test": 6}

BACKBONE: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 64,
}
LATENT_LM = {
    "kind": "latent-lm",
    "backbone": BACKBONE,
    "head": {"num_layers": 1, "intermediate_size": 64},
}
TRANSFUSION = {"kind": "transfusion", "backbone": BACKBONE, "head_layers": 1}
RECIPE: dict[str, Any] = {
    "model": LATENT_LM,
    "data": {
        "kind": "multimodal",
        "batch_elements": 512,
        "row_length": ROW_LENGTH,
        "held_out": 0.1,
    },
    "trainer": {"total_steps": 30, "save_every": 30, "validate_every": 30, "precision": "float32"},
    "optimizer": {"lr": 3e-3, "warmup_steps": 5},
    # so that a prompt counts for something in a model that has hardly learned
    "sampler": {"guidance_scale": 20.0, "num_inference_steps": 2},
}


def write_shapes(folder: Path) -> None:
    """Shapes with a caption and two questions each, and every fifth of them with nothing."""
    for split, count in NUM_IMAGES.items():
        source, rows = ShapesSource(split), []
        for number in range(count):
            example = source[number]
            write_png(folder / split / f"{number:02d}.png", example.image)
            if number % 5 == 4:
                continue
            _, colour, shape, *_ = str(example.caption).split()
            asked = [("which shape?", shape), ("which colour?", colour)]
            questions = [{"question": question, "answer": answer} for question, answer in asked]
            row = {"file_name": f"{number:02d}.png", "text": example.caption}
            rows.append(json.dumps(row | {"questions": questions}) + "\n")
        write_text(folder / split / "metadata.jsonl", "".join(rows))


def write_texts(folder: Path) -> None:
    """Texts of 20 to 400 bytes, so that some are longer than a row."""
    for number in range(20):
        words = f"text {number} says caf\u00e9. " * (1 + number)
        write_text(folder / f"{number:02d}.txt", words)


def make_sets(folder: Path) -> Path:
    """A tokenizer, shapes with their latents, and texts below ``folder``."""
    write_shapes(folder / "shapes")
    write_texts(folder / "texts")
    config = SigmaVAEConfig(latent_channels=3, network=NETWORK)
    with seeded_init("tiny pages"):
        vae = build_tokenizer(config)
    save_tokenizer(folder / "runs/vae/export", vae, TokenizerExport(tokenizer=config))
    workflows.tokenize(
        data=str(folder / "shapes"),
        vae=str(folder / "runs/vae"),
        out=folder / "latents/shapes",
        device="cpu",
    )
    return folder


def mix_of(home: Path) -> str:
    """Text, pairs and interleaved documents, 2 : 1 : 1."""
    latents = home / "latents/shapes"
    return f"text:{home / 'texts'}=2,{latents}=1,interleaved:{latents}=1"


def train(home: Path, name: str, data: str, model: dict[str, Any]) -> None:
    write_json(home / f"{name}.json", RECIPE | {"model": model})
    recipe = str(home / f"{name}.json")
    workflows.train_lm(data=data, recipe=recipe, out=home / "runs" / name, device="cpu")


def make_home(folder: Path) -> Path:
    """``make_sets``, and models: ``pages``, ``transfusion`` and, of text alone, ``words``."""
    make_sets(folder)
    train(folder, "words", f"text:{folder / 'texts'}", LATENT_LM)
    train(folder, "transfusion", mix_of(folder), TRANSFUSION)
    train(folder, "pages", mix_of(folder), LATENT_LM)
    return folder


def write(out: Path | None = None, **settings: Any) -> Result:
    settings.setdefault("model", "pages")
    return workflows.write(out=out, **{"device": "cpu", **settings})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
