"""``latentlm tokenize``: images or recordings, and a sigma-VAE => a latent set."""

from pathlib import Path
from typing import Any, Literal

from latentlm_core.artifacts import LoadedTokenizer, load_tokenizer
from latentlm_core.data.audio import ClipLimits
from latentlm_core.data.caching import LatentViews, encode_source
from latentlm_core.data.manifest import Manifest
from latentlm_core.data.pipeline import Throughput
from latentlm_core.data.sources import open_source
from latentlm_core.data.speech_caching import encode_speech
from latentlm_core.data.speech_sources import open_speech
from latentlm_core.errors import ConfigError
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import resolve_device
from latentlm_core.workflows.runs import acknowledge
from latentlm_core.workflows.workspace import find_export, slug, workspace

WAITED_SECONDS, WAITED_SHARE = 10.0, 0.1
"""From which on, both, it is worth to say that the encoder waits for images."""


@joined(PATIENCE)
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
    """Encode a data set once, or go on with it; several processes share the shards.

    Args:
        data: a data set, as ``open_source`` takes it, or ``open_speech`` for a tokenizer of speech.
        vae: run, export or hub id of a sigma-VAE; by default the newest.
        split: train or test.
        out: folder of the latent set; by default ``latents/DATA``, with the split unless train.
        flip: of images: store mirror images as well.
        crops: of images: store this many random crops instead of the centre crop.
        batch_size: images encoded at once, or seconds of audio.
        dtype: of the stored latents.
        num_workers: processes that decode images; 0 decodes in threads of this one.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        progress: listener.

    Returns:
        sizes and statistics of the set; of what was encoded now, images or clips per second, and
        the shares of the time in which the encoder waited for data and for shards to be written.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    where = resolve_device(device)
    acknowledge(data, progress)
    with current().main_first():
        export = find_export(vae, "sigma-vae", progress)
    tokenizer = load_tokenizer(export, where)
    name = slug(data) + ("" if split == "train" else f"-{split}")
    folder = out or workspace() / "latents" / name
    shared: dict[str, Any] = {
        "spec": data,
        "split": split,
        "tokenizer_export": tokenizer.folder,
        "dtype": dtype,
        "device": where,
        "progress": progress,
    }
    if tokenizer.model.modality == "speech":
        if flip or crops or num_workers:
            raise ConfigError(
                "--flip, --crops and --num-workers are for images; this is a tokenizer of speech."
            )
        return _speech(tokenizer, folder, batch_size, dry_run, shared)
    views = {"flip": flip, "crops": crops, "batch_size": batch_size, "num_workers": num_workers}
    return _images(tokenizer, folder, LatentViews(0, crops, flip), dry_run, shared | views)


def _images(
    tokenizer: LoadedTokenizer,
    folder: Path,
    views: LatentViews,
    dry_run: bool,
    options: dict[str, Any],
) -> Result:
    model = tokenizer.model
    with current().main_first():
        source = open_source(options["spec"], options["split"])
    if dry_run:
        side = model.image_size
        plan = {
            "images": len(source),
            "variants": ", ".join(views.names),
            "grid": "x".join(map(str, model.grid((3, side, side)))),
            "latent_channels": model.latent_channels,
            "tokenizer_sha256": tokenizer.sha256,
        }
        return Result("Plan of a latent set", plan, {"latents": str(folder)})
    throughput = Throughput()
    manifest = encode_source(source, model, folder, throughput=throughput, **options)
    if throughput.waited_to_read > max(WAITED_SECONDS, WAITED_SHARE * throughput.seconds):
        options["progress"].note(
            f"The encoder waited {throughput.shares['data_wait_share']:.0%} of the time for "
            "images: more --num-workers decode them faster where processors are left."
        )
    shape = {"classes": len(manifest.classes), "grid": "x".join(map(str, manifest.fixed_grid))}
    return _complete(manifest, folder, shape, "images", throughput)


def _speech(
    tokenizer: LoadedTokenizer,
    folder: Path,
    batch_seconds: int,
    dry_run: bool,
    options: dict[str, Any],
) -> Result:
    network = tokenizer.model.speech
    with current().main_first():
        source = open_speech(options["spec"], options["split"])
    rate = network.sample_rate / network.hop_length
    if dry_run:
        plan = {
            "clips": len(source),
            "speakers": len(source.classes),
            "latents_per_second": rate,
            "latent_channels": tokenizer.model.latent_channels,
            "tokenizer_sha256": tokenizer.sha256,
        }
        return Result("Plan of a latent set", plan, {"latents": str(folder)})
    throughput = Throughput()
    manifest = encode_speech(
        source,
        tokenizer.model,
        folder,
        throughput=throughput,
        limits=ClipLimits(),
        max_batch_seconds=batch_seconds,
        **options,
    )
    minutes = manifest.statistics.count / rate / 60
    shape = {"speakers": len(manifest.classes), "minutes": round(minutes, 2)}
    shape["latents_per_second"] = rate
    return _complete(manifest, folder, shape, "clips", throughput)


def _complete(
    manifest: Manifest, folder: Path, shape: dict[str, Any], unit: str, throughput: Throughput
) -> Result:
    stats = manifest.stats(manifest.posterior)
    figures = {
        "examples": manifest.num_examples,
        "skipped": len(manifest.skipped),
        **shape,
        "latent_channels": manifest.latent_channels,
        "shards": len(manifest.shards),
        "megabytes": round(sum(shard.num_bytes for shard in manifest.shards) / 1e6, 1),
        "shift": stats.shift[0],
        "scale": stats.scale[0],
    }
    if throughput.items:
        figures[f"{unit}_per_second"] = round(throughput.items / throughput.seconds, 1)
        figures |= throughput.shares
    details = {
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "skipped": [item.to_dict() for item in manifest.skipped],
    }
    return Result("Latent set complete", figures, {"latents": str(folder)}, details)
