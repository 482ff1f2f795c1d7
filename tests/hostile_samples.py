"""The target of folders of samples, as evaluations and the next call of sample read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from latentlm_core import workflows
from latentlm_core.data.audio import write_wav
from latentlm_core.data.media import write_png
from latentlm_core.evaluation.image_sets import open_images
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.workflows.claimed_folder import ClaimedFolder
from latentlm_core.workflows.spoken_folder import SpokenFolder
from tests.hostile import Target, refusals
from tests.hostile_changes import changed_bytes, changed_json_bytes, lines_of, names
from tests.hostile_folders import files_of, lay_out

SETTINGS = {"model_sha256": "0" * 64, "data": "embedded:shapes", "seed": 1}
ROWS = [
    {"file": "000000.png", "index": 0, "class": 0, "prompt": "a bear"},
    {"file": "000001.png", "index": 1, "class": 1, "prompt": "a cat", "text": "two"},
]
SPOKEN = [
    {"file": "000000.wav", "index": 0, "text": "two", "prompt": "000000.wav", "original": None}
]
FOREIGN = 3
"""Readers that refuse the folder as it is, for they are of speech."""


def make_samples(folder: Path) -> dict[str, bytes]:
    """Two images and a recording."""
    for number in range(2):
        write_png(folder / f"{number:06d}.png", np.full((4, 4, 3), 90 * number, np.uint8))
    write_wav(folder / "000000.wav", np.zeros(800, np.float32), 8000)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return files_of(folder)


@st.composite
def spoiled_samples(draw: st.DrawFn, made: dict[str, bytes]) -> dict[str, bytes]:
    """Files of such a folder with other content, or under other names."""
    match draw(st.integers(0, 3)):
        case 0:
            return {"samples.jsonl": draw(lines_of(ROWS) | lines_of(SPOKEN))}
        case 1:
            return {"settings.json": draw(changed_json_bytes(SETTINGS))}
        case 2:
            rows = [{**draw(st.sampled_from(ROWS + SPOKEN)), "file": draw(names)} for _ in range(2)]
            return {"samples.jsonl": "\n".join(json.dumps(row) for row in rows).encode()}
        case _:
            file = draw(st.sampled_from(["000000.png", "000001.png"]))
            return {file: draw(changed_bytes(made[file]))}


def use_samples(made: dict[str, bytes], case: dict[str, bytes], folder: Path) -> None:
    """Everything that reads it without a model."""
    samples = folder / "samples"
    lay_out(samples, made | case)
    options: dict[str, Any] = {"extractor": "none", "clip": "none", "device": "cpu"}
    raised = refusals(
        [
            lambda: list(open_images(samples).batches(2)),
            lambda: read_spoken_items(samples),
            lambda: workflows.evaluate_text_to_image(samples=str(samples), **options),
            lambda: SpokenFolder(samples, SETTINGS, 8000).missing(2),
            lambda: ClaimedFolder(samples, SETTINGS).claim(),
        ]
    )
    if len(raised) > FOREIGN:
        raise raised[0]


SAMPLES = Target("samples", make_samples, lambda made: {}, spoiled_samples, use_samples, 1024)
