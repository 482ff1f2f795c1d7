"""``latentlm eval sweep``: a model => its FID by guidance scale and number of solver steps."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentlm_core.data.base import Image
from latentlm_core.evaluation.image_sets import ImageSet
from latentlm_core.evaluation.statistics import ReferenceStatistics, reference_statistics
from latentlm_core.evaluation.sweep import SweepPoint, grid_points
from latentlm_core.evaluation.sweep import sweep as walk
from latentlm_core.figures import sweep_curve
from latentlm_core.files import write_json
from latentlm_core.processes import PATIENCE, current, joined
from latentlm_core.progress import SILENT, Progress
from latentlm_core.report import finite
from latentlm_core.result import Result
from latentlm_core.sampling import Engine, make_engine
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.judges import find_extractor, find_reference
from latentlm_core.workflows.reports import report_folder
from latentlm_core.workflows.sampling_plan import (
    Asked,
    SampleDtype,
    SampleMode,
    SamplingPlan,
    require_classes,
)


@joined(PATIENCE)
def sweep(
    *,
    scales: Sequence[float],
    model: str | None = None,
    reference: str | None = None,
    steps: Sequence[int] = (20,),
    num_samples: int = 1000,
    seed: int = 0,
    extractor: str = "inception",
    weights: Path | None = None,
    offline: bool = False,
    mode: SampleMode = "auto",
    dtype: SampleDtype = "auto",
    batch_size: int = 64,
    out: Path | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Result:
    """Measure the FID at each guidance scale and number of solver steps, and draw the curve.

    Several processes draw the batches of a setting in turn.

    Args:
        scales: guidance scales; 1 is off.
        model: run, export or hub id of a generator; by default the newest.
        reference: as for ``evaluate_samples``.
        steps: numbers of solver steps.
        num_samples: at each point; the same seeds at all of them.
        seed: of the samples.
        extractor: ``inception``, or the folder of a classifier.
        weights: file of Inception's weights.
        offline: never download them.
        mode: how the decode step runs.
        dtype: of the model's weights, as for ``sample``.
        batch_size: images drawn at once.
        out: folder of the report and the curve; by default ``evaluation`` in the run.
        device: auto, cpu, cuda, ...
        progress: listener.

    Raises:
        LatentLMError: anything that the user can mend.
    """
    points = grid_points(scales, steps)
    processes = current()
    plan = SamplingPlan.of(model, require_classes, Asked(mode=mode, dtype=dtype), device, progress)
    plans = {point: plan.at(Asked(**point.to_dict())) for point in points}
    loaded = plan.load()
    num_steps = math.ceil(num_samples / batch_size) * loaded.config.num_latents
    engines = {
        point: make_engine(loaded.model, own.sampler, mode, num_steps, progress)
        for point, own in plans.items()
    }
    drawing = Drawing.of(loaded, None, plan.device, progress)
    data = reference or str(loaded.config.provenance.get("data", ""))
    with processes.main_first():
        network = find_extractor(extractor, weights, offline, False, device, progress)
        theirs = find_reference(data, (drawing.image_size, drawing.image_size), progress)
    if not isinstance(theirs, ReferenceStatistics):
        theirs = reference_statistics(theirs, network, batch_size=batch_size, progress=progress)
    labels = [index % len(loaded.config.classes) for index in range(num_samples)]

    def draw(point: SweepPoint) -> ImageSet:
        return drawn_images(drawing, engines[point], str(point), labels, seed)

    found = walk(points, draw, theirs, network, batch_size=batch_size, progress=progress)
    details = {**found.to_dict(), "model_sha256": loaded.sha256, "seed": seed, **plan.settings}
    folder = out or report_folder(loaded.folder, model)
    rows = [row.to_dict() for row in found.rows]
    processes.once(lambda: write_json(folder / "sweep.json", finite(details)))
    processes.once(lambda: sweep_curve(rows, folder / "sweep.png", found.metric))
    figures = {
        "best_guidance_scale": found.best.guidance_scale,
        "best_num_inference_steps": found.best.num_inference_steps,
        "best_" + found.metric: found.best.fid,
    }
    files = {"report": str(folder / "sweep.json"), "curve": str(folder / "sweep.png")}
    return Result("Sweep", figures, files, details)


def drawn_images(
    drawing: Drawing, engine: Engine, name: str, labels: Sequence[int], seed: int
) -> ImageSet:
    """Samples of the given classes, drawn as they are read: a batch of the reader at a time."""

    def read(wanted: Sequence[range]) -> Iterator[Sequence[Image]]:
        for places in wanted:
            some = [labels[place] for place in places]
            yield list(drawing.images(engine, some, places, seed))

    size = (drawing.image_size, drawing.image_size)
    return ImageSet(name, len(labels), size, read, labels=tuple(labels))
