"""``latentlm eval caption | vqa``: what a model says of images, beside what people said."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentlm_core.artifacts import load_generator
from latentlm_core.data.base import Example
from latentlm_core.data.mix_parts import captions_of
from latentlm_core.data.sources import open_source, spread
from latentlm_core.errors import DataError
from latentlm_core.evaluation.answers import normalise_answer, score_answers
from latentlm_core.evaluation.captions import cider_scores, is_exact
from latentlm_core.files import write_json, write_text
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.runtime import machine, resolve_device, versions
from latentlm_core.sampling import TextSamplerConfig
from latentlm_core.workflows.reports import report_folder, report_name
from latentlm_core.workflows.workspace import find_export
from latentlm_core.workflows.writing import Question, Task, Writing

MAX_TOKENS = 64
"""Of a caption or an answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A document to be judged: what is asked of an image, and what people said.

    Attributes:
        task: the document.
        key: of the image.
        question: None of a caption.
        references: captions of the image, or answers to the question.
    """

    task: Task
    key: str
    question: str | None
    references: tuple[str, ...]


@joined(PATIENCE)
def evaluate_captions(
    *,
    data: str,
    model: str | None = None,
    split: str = "test",
    num_samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Describe the images of a set, greedily, and compare with their captions.

    Args:
        data: a data set with captions.
        model: run, export or hub id; by default the newest.
        split: train or test.
        num_samples: only so many images, from all over the set.
        batch_size: images at once.
        seed: of sigma's noise, with which images are read.
        out: file of the report; by default in ``evaluation`` of the run.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    judge = _Judge(model, data, split, num_samples, seed, device, progress)
    asked = [
        Asked(Task((example.image,), example.key, num_tokens=MAX_TOKENS), example.key, None, known)
        for example in _examples(data, split, num_samples)
        if (known := tuple(captions_of(example.caption)))
    ]
    said = judge.ask(asked, "captions", batch_size)
    references = [one.references for one in asked]
    exact = [float(is_exact(*pair)) for pair in zip(said, references, strict=True)]
    ciders = cider_scores(said, references)
    values = {"exact_match": _mean(exact), "cider": _mean(ciders), "images": len(asked)}
    rows = [
        {"key": one.key, "said": text, "references": one.references}
        | {"exact": score, "cider": cider}
        for one, text, score, cider in zip(asked, said, exact, ciders, strict=True)
    ]
    return judge.report("caption", values, rows, out)


@joined(PATIENCE)
def evaluate_vqa(
    *,
    data: str,
    model: str | None = None,
    split: str = "test",
    num_samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Answer all questions about the images of a set, and compare under VQA's rules.

    Arguments and errors as ``evaluate_captions``, of a data set with questions.
    """
    judge = _Judge(model, data, split, num_samples, seed, device, progress)
    asked = [
        Asked(
            Task((example.image, Question(question)), example.key, num_tokens=MAX_TOKENS),
            example.key,
            question,
            (answer,),
        )
        for example in _examples(data, split, num_samples)
        for question, answer in example.questions
    ]
    said = judge.ask(asked, "questions", batch_size)
    scores = score_answers(said, [one.references for one in asked])
    by_question: dict[str, list[float]] = {}
    for one, score in zip(asked, scores.each, strict=True):
        by_question.setdefault(str(one.question), []).append(score)
    values: dict[str, Any] = {scores.metric: scores.accuracy, "questions": len(asked)}
    rows = [
        {"key": one.key, "question": one.question, "said": text, "references": one.references}
        | {"normalised": normalise_answer(text), "score": score}
        for one, text, score in zip(asked, said, scores.each, strict=True)
    ]
    few = len(by_question) <= MAX_LISTED
    more = {"by_question": {name: _mean(each) for name, each in by_question.items()}} if few else {}
    return judge.report("vqa", values, rows, out, more)


MAX_LISTED = 50
"""Kinds of questions that a report lists, if there are no more."""


class _Judge:
    """Asks a model about some images and writes what it said."""

    def __init__(
        self,
        model: str | None,
        data: str,
        split: str,
        num_samples: int | None,
        seed: int,
        device: str,
        progress: Progress,
    ) -> None:
        self._model, self._data, self._split = model, data, split
        self._num_samples, self._seed = num_samples, seed
        self._device = resolve_device(device)
        self._progress = progress
        with current().main_first():
            export = find_export(model, "generator", progress)
        self._loaded = load_generator(export, self._device)
        self._writing = Writing.of(self._loaded, None, self._device, progress)

    def ask(self, asked: Sequence[Asked], what: str, batch_size: int) -> list[str]:
        """What the model says, greedily; ``what`` is asked for, captions or questions.

        Several processes take the batches in turn.
        """
        if not asked:
            raise DataError(f"{self._data} has no {what} in its split {self._split!r}.")
        writing = self._writing
        engine = writing.engine(self._loaded.config.sampler, TextSamplerConfig())

        def ask(start: int) -> list[str]:
            batch = [one.task for one in asked[start : start + batch_size]]
            indices = range(start, start + len(batch))
            said = []
            for continuation in writing.write(engine, batch, indices, self._seed):
                words = [piece for piece in continuation.pieces if isinstance(piece, tuple)]
                said.append("".join(map(writing.text.decode, words)).strip())
            return said

        answers: list[str] = []
        with self._progress.bar("asking", len(asked), what) as bar:
            for said in current().shared(ask, range(0, len(asked), batch_size)):
                answers += said
                bar.advance(len(said))
        return answers

    def report(
        self,
        metric: str,
        values: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        out: Path | None,
        more: dict[str, Any] | None = None,
    ) -> Result:
        """Write the report and, beside it, a row for each image or question."""
        details = {
            "metric": metric,
            "data": self._data,
            "split": self._split,
            "num_samples": self._num_samples,
            "decoding": "greedy",
            "max_tokens": MAX_TOKENS,
            "seed": self._seed,
            "model_sha256": self._loaded.sha256,
            "machine": machine(self._device),
            "versions": versions(),
            "values": values,
            **(more or {}),
        }
        name = report_name(metric, self._data, self._split, self._num_samples)
        path = out or report_folder(self._loaded.folder, self._model) / name
        table = path.with_suffix(".jsonl")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        current().once(lambda: write_text(table, lines))
        current().once(lambda: write_json(path, finite(details)))
        files = {"report": str(path), "rows": str(table)}
        return Result(f"{metric} of {self._data}", values, files, details)


def _examples(data: str, split: str, count: int | None) -> Sequence[Example]:
    with current().main_first():
        source = spread(open_source(data, split), count)
    return [source[index] for index in range(len(source))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
