"""``latentlm eval ppl``: how well a model of text, or of text and images, predicts text."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from latentlm_core.artifacts import load_generator
from latentlm_core.data.documents import Document, pad
from latentlm_core.data.texts import is_parted, open_texts
from latentlm_core.errors import DataError
from latentlm_core.evaluation.perplexity import TextLoss, score_text
from latentlm_core.files import write_json
from latentlm_core.models.latent_lm import LatentLM
from latentlm_core.models.transfusion import Transfusion
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.runtime import evaluating, machine, resolve_device, versions
from latentlm_core.workflows.reports import report_folder, report_name
from latentlm_core.workflows.workspace import find_export
from latentlm_core.workflows.writing import Writing

HELD_OUT = "what training holds out of it"
"""The split of a report where the texts have no test split."""


@joined(PATIENCE)
def evaluate_perplexity(
    *,
    data: str,
    model: str | None = None,
    split: str = "test",
    num_samples: int | None = None,
    batch_size: int = 16,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Measure perplexity per token, and bits per byte, which compare between tokenizers.

    A document longer than those that the model has seen is read in stretches of that length; each
    begins where the one before ends, so every token is predicted once, those at a beginning with
    less context. Several processes share the batches of stretches.

    Args:
        data: a set of texts, as ``data.texts`` opens it; ``text:`` in front of it is left off.
        model: run, export or hub id; by default the newest.
        split: train or test; where there is no test, as of a file, what training holds out of it.
            Such a set is read whole with all.
        num_samples: only the first so many documents.
        batch_size: stretches read at once.
        out: file of the report; by default in ``evaluation`` of the run.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    processes = current()
    where = resolve_device(device)
    spec = data.removeprefix("text:")
    with processes.main_first():
        export = find_export(model, "generator", progress)
    loaded = load_generator(export, where)
    writing = Writing.of(loaded, None, where, progress)
    part = split
    with processes.main_first():
        items = open_texts(spec, split)[:num_samples]
        if split == "test" and not is_parted(spec):
            part = HELD_OUT
            progress.note(f"{spec} has no test split: this is {part}; --split all reads it whole.")
    if not items:
        raise DataError(f"{spec} has no documents in its split {split!r}.")
    stretches = [
        (number, stretch)
        for number, item in enumerate(items)
        for stretch in writing.format.stretches(item.text, item.key, writing.max_length)
    ]

    def read(start: int) -> list[tuple[int, float, int]]:
        batch = stretches[start : start + batch_size]
        costs = _costs(writing.model, [document for _, document in batch], where)
        pairs = zip(batch, costs, strict=True)
        return [(number, float(cost.sum()), len(cost)) for (number, _), cost in pairs]

    nats, tokens = [0.0] * len(items), [0] * len(items)
    starts = range(0, len(stretches), batch_size)
    with progress.bar("reading", len(stretches), "stretches") as bar, evaluating(writing.model):
        for found in processes.shared(read, starts):
            for number, cost, count in found:
                nats[number] += cost
                tokens[number] += count
            bar.advance(len(found))
    score = score_text(
        [
            TextLoss(nat, count, len(item.text.encode("utf-8", "replace")))
            for nat, count, item in zip(nats, tokens, items, strict=True)
        ]
    )
    details = {
        "metric": "perplexity",
        "data": spec,
        "split": part,
        "num_samples": num_samples,
        "context": writing.max_length,
        "stride": writing.max_length - 1,
        "text_tokenizer": loaded.config.text_sha256,
        "model_sha256": loaded.sha256,
        "machine": machine(where),
        "versions": versions(),
        "values": score.to_dict(),
    }
    name = report_name("ppl", spec, split, num_samples)
    path = out or report_folder(loaded.folder, model) / name
    processes.once(lambda: write_json(path, finite(details)))
    return Result("Perplexity", score.to_dict(), {"report": str(path)}, details)


def _costs(
    model: LatentLM | Transfusion, documents: Sequence[Document], device: torch.device
) -> list[Tensor]:
    """The negative log-likelihood, in nats, of every token of some documents but the first."""
    batch = pad(documents).to(device)
    states = model.states(batch.ids[:, :-1], batch.latents[:, :-1], batch.layout).flatten(0, 1)
    logits = model.logits(states[batch.layout.text_targets]).float()
    targets = batch.ids[:, 1:].flatten()[batch.layout.text_targets]
    costs = F.cross_entropy(logits, targets, reduction="none").cpu()
    return list(torch.split(costs, [len(document) - 1 for document in documents]))
