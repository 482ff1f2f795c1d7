"""Quality against evaluations of the head: the demo's model, and the few-step one made of it.

Run it where `latentlm demo` has left its results (or with LATENTLM_HOME naming that folder). It
distils the head of runs/demo-lm, unless that was done before, and draws 1,000 digits, of the same
seeds each time, with the teacher's guided solver and with the student. The demo's classifier reads
them, and gives the features on which they are compared with the training digits. The teacher needs
unconditional rows for its guidance, so each of its steps evaluates the head twice as many times.

    python examples/few_steps.py [FILE.json]        the picture goes to FILE.png
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentlm_core import workflows
from latentlm_core.artifacts import LoadedGenerator, load_generator
from latentlm_core.data.sources import open_source
from latentlm_core.evaluation.classifier import (
    ClassifierExtractor,
    ImageClassifier,
    class_accuracy,
)
from latentlm_core.evaluation.image_sets import image_array, image_source
from latentlm_core.evaluation.images import evaluate_images
from latentlm_core.evaluation.statistics import reference_statistics
from latentlm_core.figures import quality_curves
from latentlm_core.files import write_json
from latentlm_core.progress import SILENT
from latentlm_core.runtime import machine, versions
from latentlm_core.sampling import make_engine
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.sweep import drawn_images
from latentlm_core.workflows.workspace import workspace

DATA, TEACHER, STUDENT = "mnist", "runs/demo-lm", "runs/demo-lm-few-step"
TEACHER_STEPS, STUDENT_STEPS = (20, 10, 4, 2, 1), (4, 2, 1)
NUM_SAMPLES, BATCH, SIZE = 1000, 200, 32
CPU = torch.device("cpu")


class Judge:
    """Reads samples, and tells how far they are from the training digits."""

    def __init__(self, folder: Path) -> None:
        self.classifier = ImageClassifier.load(folder)
        self.extractor = ClassifierExtractor(self.classifier)
        digits = image_source(open_source(DATA, "train"), SIZE)
        self.reference = reference_statistics(digits, self.extractor)

    def rows(self, name: str, loaded: LoadedGenerator, steps: tuple[int, ...]) -> Iterator[Any]:
        """A row for each number of steps."""
        drawing = Drawing.of(loaded, None, CPU, SILENT)
        labels = [index % len(loaded.config.classes) for index in range(NUM_SAMPLES)]
        for number in steps:
            config = loaded.config.sampler.model_copy(update={"num_inference_steps": number})
            engine = make_engine(loaded.model, config)
            start = time.process_time()
            drawn = drawn_images(drawing, engine, f"{name} {number}", labels, seed=0)
            images = np.concatenate(list(drawn.batches(BATCH)))
            seconds = time.process_time() - start
            samples = image_array(images, drawn.name, labels)
            report = evaluate_images(["fid"], samples, self.reference, self.extractor)
            (distance,) = report.values.values()
            yield {
                "model": name,
                "steps": number,
                "rows": 2 if config.is_guided else 1,
                "distance": round(distance, 4),
                "accuracy": class_accuracy(self.classifier, samples),
                "cpu_seconds": round(seconds, 1),
            }


def main(target: Path | None) -> None:
    """Distil, draw, judge and write."""
    home = workspace()
    made = workflows.distill(teacher=str(home / TEACHER), data=str(home / "latents/demo"))
    judge = Judge(home / "runs/demo-classifier")
    rows = []
    for name, run, steps in (
        ("teacher", TEACHER, TEACHER_STEPS),
        ("student", STUDENT, STUDENT_STEPS),
    ):
        for row in judge.rows(name, load_generator(home / run / "export", CPU), steps):
            print(row, flush=True)
            rows.append(row)
    if target is None:
        return
    report = {
        "machine": machine(),
        "versions": versions(),
        "samples": NUM_SAMPLES,
        "extractor": judge.extractor.name,
        "distillation": made.figures,
        "rows": rows,
    }
    write_json(target, report)
    lines = {
        name: [(row["steps"], row["distance"]) for row in rows if row["model"] == name]
        for name in ("teacher", "student")
    }
    quality_curves(lines, f"fid[{judge.extractor.name}]", target.with_suffix(".png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
