"""Reports as the commands write them: where, of which weights, with what warnings."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from latentlm_core import workflows
from latentlm_core.artifacts import (
    load_generator,
)
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, DataError
from latentlm_core.files import sha256_file, write_json
from latentlm_core.progress import SILENT
from latentlm_core.sampling import Request, make_engine
from latentlm_core.workflows.drawing import Drawing
from latentlm_core.workflows.judges import lpips_record
from latentlm_core.workflows.reports import report_folder, reports_of
from latentlm_core.workflows.sweep import drawn_images
from tests.tiny_evaluation import DATA, LM, SMALL, VAE, make_home, pixels, save_pngs
from tests.tiny_training import Listener

CPU = torch.device("cpu")
JUDGED = {"extractor": "judge", "device": "cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("LATENTLM_HOME", raising=False)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Images of noise with the records that ``latentlm sample`` leaves."""
    folder = tmp_path / "noise"
    save_pngs(folder, pixels(8, size=32))
    rows = [{"file": f"{index:06d}.png", "class": 1} for index in range(8)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "settings.json", {"model_sha256": "f00", "seed": 7, "data": DATA})
    return folder


def fid(samples: Path, **options: object):
    return workflows.evaluate_samples(metrics=["fid"], samples=str(samples), **JUDGED, **options)


# Samples


def test_a_report_of_samples_states_how_they_were_made(samples: Path) -> None:
    result = fid(samples)
    assert result.details["model_sha256"] == "f00"
    assert result.details["samples_settings"] == {"model_sha256": "f00", "seed": 7, "data": DATA}
    assert json.loads((samples / "evaluation" / "fid.json").read_text()) == result.details
    warned = "The samples cover 1 of the 4 classes of the reference."
    assert warned in result.details["warnings"]


def test_the_npz_of_samples_is_of_their_model_and_other_files_are_of_none(samples: Path) -> None:
    for name in ("samples.npz", "other.npz"):
        np.savez(samples / name, pixels(4, size=32))
    assert fid(samples / "samples.npz").details["model_sha256"] == "f00"
    assert fid(samples / "other.npz", reference=DATA).details["samples_settings"] is None
    with pytest.raises(ArtifactError, match="is not known"):
        fid(samples / "other.npz")


@pytest.mark.parametrize("content", ["[]", "3", '"x"'])
def test_settings_that_are_no_object_are_refused(samples: Path, content: str) -> None:
    (samples / "settings.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"settings.json must be a JSON object"):
        fid(samples)


def test_settings_with_numbers_that_json_lacks_do_not_break_the_report(samples: Path) -> None:
    (samples / "settings.json").write_text(f'{{"data": "{DATA}", "seed": NaN}}')
    written = Path(fid(samples).files["report"]).read_text()
    assert json.loads(written)["samples_settings"]["seed"] is None


def test_a_data_set_cannot_be_the_reference_of_oblong_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "oblong.npz", np.zeros((3, 32, 16, 3), np.uint8))
    with pytest.raises(DataError, match=r"16x32.*squares only"):
        fid(tmp_path / "oblong.npz", reference=DATA)


# Reconstruction and statistics


def rebuild(**options: object):
    return workflows.evaluate_reconstruction(
        extractor="none", num_samples=4, offline=True, device="cpu", **options
    )


def test_a_reconstruction_names_its_split() -> None:
    progress = Listener()
    tested = rebuild(vae=str(VAE), data=DATA, progress=progress)
    assert (tested.details["split"], tested.figures["split"]) == ("test", "test")
    assert progress.warnings == []
    trained = rebuild(vae=str(VAE), data=DATA, split="train", progress=progress)
    assert trained.details["split"] == "train"
    assert progress.warnings == list(trained.details["warnings"])
    assert "may have been trained on" in progress.warnings[0]


def test_data_without_a_test_split_is_measured_on_what_training_holds_out(tmp_path: Path) -> None:
    save_pngs(tmp_path / "flat", pixels(41, size=32))
    found = rebuild(vae=str(VAE), data=str(tmp_path / "flat"))
    assert found.details["split"] == "what train-vae holds out of train"
    assert found.details["num_images"] == 3
    save_pngs(tmp_path / "single", pixels(1, size=32))
    assert rebuild(vae=str(VAE), data=str(tmp_path / "single")).details["split"] == "train"


def test_the_weights_of_lpips_are_named_with_their_hash(random_lpips, tmp_path: Path) -> None:
    assert lpips_record(None) is None
    random_lpips.weights_file = tmp_path / "alex.pth"
    random_lpips.weights_file.write_bytes(b"weights")
    assert lpips_record(random_lpips) == {
        "net": "alex",
        "weights_file": str(tmp_path / "alex.pth"),
        "weights_sha256": sha256_file(tmp_path / "alex.pth"),
    }
    found = rebuild(vae=str(VAE), data=DATA).details
    assert ("lpips" in found["values"]) == (found["lpips"] is not None)


def test_statistics_of_few_images_are_warned_of(tmp_path: Path) -> None:
    progress = Listener()
    workflows.make_statistics(
        data=DATA, image_size=32, num_samples=9, out=tmp_path / "s.npz", progress=progress, **JUDGED
    )
    assert [text for text in progress.warnings if "9 images, fewer than 2048" in text]


# Sweeps


class Counting:
    """A real engine that is counted."""

    def __init__(self, engine) -> None:
        self.engine, self.sizes = engine, []

    def generate(self, requests: list[Request], on_position=None):
        self.sizes.append(len(requests))
        return self.engine.generate(requests, on_position)


def test_samples_of_a_sweep_are_drawn_a_batch_at_a_time() -> None:
    loaded = load_generator(LM, CPU)
    engine = Counting(make_engine(loaded.model, SMALL))
    drawing = Drawing.of(loaded, None, CPU, SILENT)
    labels = [index % 10 for index in range(5)]
    images = drawn_images(drawing, engine, "x", labels, 3)
    assert (len(images), images.labels, engine.sizes) == (5, tuple(labels), [])
    batches = images.batches(2)
    first = next(batches)
    assert engine.sizes == [2]
    found = np.concatenate([first, *batches])
    whole = drawing.images(engine.engine, labels, range(5), 3)
    assert np.abs(found.astype(int) - whole).max() <= 1  # other batches round differently


def test_a_sweep_states_its_weights_and_warns_once() -> None:
    progress = Listener()
    result = workflows.sweep(
        scales=[1.0, 2.0], steps=[2, 3], num_samples=4, seed=5, progress=progress, **JUDGED
    )
    assert Path(result.files["report"]) == LM.parent / "evaluation" / "sweep.json"
    stored = json.loads(Path(result.files["report"]).read_text())
    assert stored["model_sha256"] == sha256_file(LM / "model.safetensors")
    assert (stored["seed"], stored["sampler"]) == (5, SMALL.to_dict())
    assert len([text for text in progress.warnings if "4 samples are fewer" in text]) == 1


@pytest.mark.parametrize(
    ("scales", "steps", "named"),
    [
        ([1.0], [0], "num_inference_steps = 0"),
        ([-3.0], [2], "guidance_scale = -3"),
        ([float("nan")], [2], "guidance_scale"),
        ([1.0], [2, 1000], "num_inference_steps"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_drawn(
    scales: list[float], steps: list[int], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        workflows.sweep(scales=scales, steps=steps, num_samples=10**9, **JUDGED)


# Where reports lie


def test_reports_lie_in_the_run_or_else_in_the_workspace(tmp_path: Path) -> None:
    assert report_folder(LM, None) == Path("runs/lm/evaluation")
    cached = tmp_path / "models--a--digits" / "snapshots" / "0123"
    assert report_folder(cached, "hf:a/digits") == Path("evaluation/digits")
    bare = tmp_path / "other" / "export"
    assert report_folder(bare, str(bare)) == Path("evaluation/other")
    assert report_folder(tmp_path / "bare", None) == Path("evaluation/bare")


def test_only_reports_of_these_very_weights_are_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path))
    export = tmp_path / LM
    os.makedirs(export)
    (export.parent / "metrics.jsonl").touch()
    values = {"values": {"fid": 1.0}}
    reports = {
        "runs/lm/evaluation/a.json": values | {"model_sha256": "ours"},
        "runs/lm/evaluation/b.json": values | {"model_sha256": "theirs"},
        "runs/lm/evaluation/c.json": values,
        "runs/lm/evaluation/d.json": {"model_sha256": "ours"},
        "runs/lm/evaluation/e.json": [1],
        "runs/other/evaluation/f.json": values | {"model_sha256": "ours"},
        "evaluation/digits/recon.json": {"values": {"psnr": 2.0}, "vae_sha256": "ours"},
        "samples/x/evaluation/fid.json": {"values": {"fid": 3.0}, "model_sha256": "ours"},
        "samples/y/evaluation/fid.json": {"values": {"fid": 4.0}, "model_sha256": None},
    }
    for name, report in reports.items():
        write_json(tmp_path / name, report)
    (tmp_path / "runs/lm/evaluation/broken.json").write_bytes(b"\xff{")
    progress = Listener()
    found = reports_of(export, "ours", progress)
    assert [report["values"] for report in found] == [{"fid": 1.0}, {"psnr": 2.0}, {"fid": 3.0}]
    named = [name for text in progress.warnings for name in ("broken", "d.", "e.") if name in text]
    assert len(progress.warnings) == 3
    assert {"broken", "d.", "e."} <= set(named)
