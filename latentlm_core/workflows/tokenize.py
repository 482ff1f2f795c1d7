"""``latentlm tokenize``: images and a sigma-VAE => a latent set."""

from pathlib import Path
from typing import Literal

from latentlm_core.artifacts import load_tokenizer
from latentlm_core.data.caching import LatentViews, encode_source
from latentlm_core.data.sources import open_source
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.workflows.workspace import find_export, slug, workspace


def tokenize(
    *,
    data: str,
    vae: str | None = None,
    split: str = "train",
    out: Path | None = None,
    flip: bool = False,
    crops: int = 0,
    batch_size: int = 64,
    dtype: Literal["float32", "float16"] = "float32",
    num_workers: int = 0,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Encode a data set once, or go on with it.

    Args:
        data: a data set, as ``data.sources.open_source`` takes it.
        vae: run, export or hub id of a sigma-VAE; by default the newest.
        split: train or test.
        out: folder of the latent set; by default ``latents/DATA``, with the split unless train.
        flip: store mirror images as well.
        crops: store this many random crops instead of the centre crop.
        batch_size: images encoded at once.
        dtype: of the stored latents.
        num_workers: decoding processes.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        sizes and statistics of the set.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    where = resolve_device(device)
    tokenizer = load_tokenizer(find_export(vae, "sigma-vae", progress), where)
    source = open_source(data, split)
    name = slug(data) + ("" if split == "train" else f"-{split}")
    folder = out or workspace() / "latents" / name
    files = {"latents": str(folder)}
    if dry_run:
        views = LatentViews(tokenizer.model.image_size, crops, flip)
        size = tokenizer.model.image_size
        plan = {
            "images": len(source),
            "variants": ", ".join(views.names),
            "grid": "x".join(map(str, tokenizer.model.grid((3, size, size)))),
            "latent_channels": tokenizer.model.latent_channels,
            "tokenizer_sha256": tokenizer.sha256,
        }
        return Result("Plan of a latent set", plan, files)
    manifest = encode_source(
        source,
        tokenizer.model,
        folder,
        spec=data,
        split=split,
        tokenizer_export=tokenizer.folder,
        flip=flip,
        crops=crops,
        batch_size=batch_size,
        dtype=dtype,
        device=where,
        num_workers=num_workers,
        progress=progress,
    )
    stats = manifest.stats(manifest.posterior)
    figures = {
        "examples": manifest.num_examples,
        "skipped": len(manifest.skipped),
        "classes": len(manifest.classes),
        "grid": "x".join(map(str, manifest.grid)),
        "latent_channels": manifest.latent_channels,
        "shards": len(manifest.shards),
        "megabytes": round(sum(shard.num_bytes for shard in manifest.shards) / 1e6, 1),
        "shift": stats.shift[0],
        "scale": stats.scale[0],
    }
    details = {
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "skipped": [item.to_dict() for item in manifest.skipped],
    }
    return Result("Latent set complete", figures, files, details)
