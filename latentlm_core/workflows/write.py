"""``latentlm sample --prompt`` and its like: a model of text and images => documents.

A document is decided by (seed, its index) and its prompt: its files are the same whatever the batch
size. A folder remembers its settings, so the same command goes on where it was interrupted and
another one is refused. Several processes take the batches in turn.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from latentlm_core.config import build
from latentlm_core.data.base import Image
from latentlm_core.diffusion import Solver
from latentlm_core.errors import ConfigError
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.result import Result
from latentlm_core.runtime import derive_seed
from latentlm_core.sampling import (
    Continuation,
    ContinuationListener,
    InterleavedEngine,
    TextSamplerConfig,
)
from latentlm_core.workflows.claimed_folder import DEFAULTS, UNCOMPARED, Batch
from latentlm_core.workflows.continuation_folder import ContinuationFolder
from latentlm_core.workflows.memory import Fitting, cache_bytes
from latentlm_core.workflows.sampling_plan import Asked, SampleDtype, SampleMode, SamplingPlan
from latentlm_core.workflows.tasks import MAX_TOKENS, CaptionTasks, asked_tasks
from latentlm_core.workflows.workspace import slug, workspace
from latentlm_core.workflows.writing import Engine, Question, Task, Writing, require_pages

TextSink = Callable[[str], None]
"""Takes text as it is written."""
MAX_NAME = 40
"""Characters of a prompt that the name of a folder has."""
NUM_SHOWN = 8
"""Samples whose text the result shows."""


@joined(PATIENCE)
def write(
    *,
    model: str | None = None,
    prompts: Sequence[str] = (),
    captions_of: Sequence[Path] = (),
    question: str | None = None,
    images: Sequence[Path] = (),
    text_only: Sequence[str] = (),
    interleaved: Path | None = None,
    data: str | None = None,
    split: str = "test",
    num_samples: int | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    num_inference_steps: int | None = None,
    solver: Solver | None = None,
    mode: SampleMode = "auto",
    dtype: SampleDtype = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
    out: Path | None = None,
    batch_size: int = 64,
    vae: str | None = None,
    device: str = "auto",
    dry_run: bool = False,
    sink: TextSink | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Draw images of prompts, describe images, answer questions, go on with texts and documents.

    Args:
        model: run, export or hub id of a model of text and images; by default the newest.
        prompts: what to draw.
        captions_of: image files to describe.
        question: about each of ``images``.
        images: image files that the question is about.
        text_only: what to go on with, without images.
        interleaved: a JSON file of words and images to go on with; the model says when it draws.
        data: a data set whose captions are drawn.
        split: of ``data``, train or test.
        num_samples: of each prompt, all of them in turn, 1 if left out; of the captions of
            ``data``, all if left out.
        max_tokens: tokens of a document at most.
        seed: of the whole; each document's own seed follows from it and the document's index.
        guidance_scale: of images; by default the model's own, as with the next three.
        guidance_interval: shares of the last timestep between which guidance acts.
        num_inference_steps: solver steps per latent.
        solver: dpmsolver++ or ddpm.
        mode: how the decode step runs.
        dtype: of the weights; by default bfloat16 on a GPU that has it built in, else float32.
        temperature: of words; 0 takes the likeliest.
        top_p: only the likeliest words that make up this share.
        out: folder; by default ``samples/`` and a name made of these settings.
        batch_size: documents made at once, or fewer if so many do not fit into memory.
        vae: another tokenizer with the same weights than the one in the model's export.
        device: auto, cpu, cuda, ...
        dry_run: only tell what would happen.
        sink: takes the text of a single document while it is written, and a line's end.
        progress: listener.

    Returns:
        what was written and drawn, and where it is.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    asked = asked_tasks(
        prompts=prompts,
        captions_of=captions_of,
        question=question,
        images=images,
        text_only=text_only,
        interleaved=interleaved,
        data=data,
        max_tokens=max_tokens,
    )
    text_config = build(TextSamplerConfig, {"temperature": temperature, "top_p": top_p}, "sampling")
    _check_usage(asked, num_samples or 1, text_config)
    processes = current()
    plan = SamplingPlan.of(
        model,
        require_pages,
        Asked(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            num_inference_steps=num_inference_steps,
            solver=solver,
            mode=mode,
            dtype=dtype,
        ),
        device,
        progress,
    )
    loaded = plan.load()
    with processes.main_first():
        writing = Writing.of(loaded, vae, plan.device, progress)
    tasks: Sequence[Task] = (
        asked * (num_samples or 1) if data is None else CaptionTasks(data, split, num_samples)
    )
    for task in asked or [tasks[0]]:
        writing.check(task)
    settings = {
        "model_sha256": loaded.sha256,
        "data": loaded.config.provenance.get("data"),
        "prompts": data or [_fingerprint(task) for task in asked],
        "split": data and split,
        "num_samples": num_samples if data else None,
        "max_tokens": max_tokens,
        "seed": seed,
        **plan.settings,
        "text_sampler": text_config.to_dict(),
    }
    label = slug(data) if data else asked[0].label
    name = _folder_name(plan.run_name, label, settings)
    folder = ContinuationFolder(out or workspace() / "samples" / name, settings)
    figures: dict[str, Any] = {"samples": len(tasks), **plan.figures, "seed": seed}
    files = {"samples": str(folder.path)}
    if dry_run:
        return Result("Plan of samples", figures, files, settings)
    heard = sink if len(tasks) == 1 and tasks[0].num_tokens else None
    told = SILENT if heard else progress  # a bar would run through the text

    def make(size: int) -> Engine:
        num_steps = math.ceil(len(tasks) / size) * writing.num_steps(tasks[0])
        return writing.engine(plan.sampler, text_config, plan.mode, num_steps, progress)

    with folder.held(processes):
        fitting = Fitting(
            make,
            min(batch_size, len(tasks)),
            plan.num_branches * cache_bytes(writing.model, writing.max_length),
            plan.device,
            progress,
        )
        with folder.unmade(len(tasks), batch_size, processes, told, "writing") as (batches, bar):
            for batch in batches:
                _write_batch(folder, writing, fitting, tasks, batch, seed, heard)
                bar.advance(len(batch.missing))
        files |= processes.once(folder.finish)
    engine = fitting.engine
    figures["mode"] = engine.mode if isinstance(engine, InterleavedEngine) else "eager"
    rows = processes.once(folder.rows)[: min(len(tasks), NUM_SHOWN)]
    written = {str(row["index"]): row["text"] for row in rows if row["text"]}
    if written:
        figures["text"] = written["0"] if len(tasks) == 1 else written
    return Result("Samples made", figures, files, settings)


def _folder_name(run: str, label: str, settings: dict[str, Any]) -> str:
    """Of samples: a few words for people, and a digest of what decides them."""
    words = slug((label or "nothing").replace("/", " ")[:MAX_NAME])
    ignored = UNCOMPARED | ({"dtype"} if settings["dtype"] == DEFAULTS["dtype"] else set())
    deciding = {name: value for name, value in settings.items() if name not in ignored}
    return f"{run}-{words}-{hashlib.sha256(repr(deciding).encode()).hexdigest()[:8]}"


def _check_usage(asked: Sequence[Task], num_samples: int, config: TextSamplerConfig) -> None:
    """Refuse to write the same words several times."""
    draws = not asked or any(task.num_images for task in asked)
    if num_samples > 1 and not draws and config.temperature == 0.0:
        raise ConfigError(
            f"At --temperature 0 there is one text of a prompt, so {num_samples} of each would be "
            "the same.",
            hint="Say --temperature 1, or leave -n out.",
        )


def _write_batch(
    folder: ContinuationFolder,
    writing: Writing,
    fitting: Fitting[Engine],
    tasks: Sequence[Task],
    batch: Batch,
    seed: int,
    sink: TextSink | None,
) -> None:
    """Make a batch and write what is not there yet; the sink hears it where it is one document."""
    listener = sink and _streaming(writing, sink)

    def write(engine: Engine, size: int) -> None:
        for part in batch.parts(size):
            wanted = [tasks[index] for index in part.indices]
            continuations = writing.write(engine, wanted, part.indices, seed, listener)
            if sink:
                sink("\n")
            for index, task, made in zip(part.indices, wanted, continuations, strict=True):
                if index in part.missing:
                    own = derive_seed(seed, "sample", index)
                    folder.add(index, _prompt(task), _readable(writing, made), made.ended_by, own)

    fitting.run(write)


def _readable(writing: Writing, made: Continuation) -> list[str | Image]:
    """The pieces of a document as text and images."""
    images = iter(writing.show([piece for piece in made.pieces if isinstance(piece, Tensor)]))
    return [
        next(images) if isinstance(piece, Tensor) else writing.text.decode(piece)
        for piece in made.pieces
    ]


def _streaming(writing: Writing, sink: TextSink) -> ContinuationListener:
    """A listener that hands text on as soon as its characters are whole."""
    ids: list[int] = []
    told = 0

    def hear(index: int, made: int | Tensor) -> None:
        nonlocal told
        if isinstance(made, Tensor):
            sink("\n[image]\n")
            ids.clear()
            told = 0
            return
        ids.append(made)
        text = writing.text.decode(ids).rstrip("\ufffd")
        sink(text[told:])
        told = max(told, len(text))

    return hear


def _prompt(task: Task) -> str:
    """The words of a prompt, questions among them."""
    words = (piece.text if isinstance(piece, Question) else piece for piece in task.pieces)
    return "\n".join(piece for piece in words if isinstance(piece, str))


def _fingerprint(task: Task) -> dict[str, Any]:
    """A prompt in settings: its words, digests of its images, and what is to be made of it."""
    pieces = [
        str(piece)
        if isinstance(piece, str | tuple)
        else hashlib.sha256(piece.tobytes()).hexdigest()
        for piece in task.pieces
    ]
    return {"pieces": pieces, "draw": task.draw, "num_images": task.num_images}
