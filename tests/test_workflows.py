"""The whole path on drawn shapes, as the commands walk it, and what bad input gets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from latentlm_core import workflows
from latentlm_core.data.sources import open_source
from latentlm_core.errors import ArtifactError, ConfigError, DataError, LatentLMError
from latentlm_core.evaluation.classifier import train_classifier
from latentlm_core.files import sha256_file

DATA = "embedded:shapes"
FEW = ["trainer.total_steps=6", "trainer.save_every=3", "trainer.log_every=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A workspace with a tiny tokenizer, latents, a LatentLM and a classifier in it."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLM_HOME", str(folder))
        workflows.train_vae(data=DATA, overrides=FEW, device="cpu")
        workflows.tokenize(data=DATA, device="cpu")
        workflows.train_lm(overrides=FEW, device="cpu")
    source = open_source(DATA)
    judge = train_classifier(source, open_source(DATA, "test"), image_size=32, num_steps=20)
    judge.save(folder / "judge")
    return folder


@pytest.fixture(autouse=True)
def _workspace(request, monkeypatch):
    if "home" in request.fixturenames:
        monkeypatch.setenv("LATENTLM_HOME", str(request.getfixturevalue("home")))


def png_hashes(folder: Path) -> list[str]:
    return [sha256_file(path) for path in sorted(folder.glob("0*.png"))]


def test_runs_leave_what_they_promise(home):
    for run in ("vae-embedded-shapes", "lm-embedded-shapes"):
        folder = home / "runs" / run
        for name in ("config.json", "metrics.jsonl", "curves.png", "export/model.safetensors"):
            assert (folder / name).is_file()
    provenance = json.loads((home / "runs/lm-embedded-shapes/export/config.json").read_text())[
        "provenance"
    ]
    assert provenance["data"] == DATA
    assert provenance["step"] == 6
    assert provenance["figures"]["validation/latent"] > 0


def test_a_second_start_reuses_what_is_done(home):
    export = home / "runs/lm-embedded-shapes/export/model.safetensors"
    before = sha256_file(export)
    again = workflows.train_lm(overrides=FEW, device="cpu")
    assert again.figures["step"] == 6
    assert sha256_file(export) == before


def test_samples_do_not_depend_on_the_batch_and_more_only_adds_files(home, tmp_path):
    asked = {"classes": ["circle"], "seed": 3, "guidance_scale": 2.0, "device": "cpu"}
    one, many = tmp_path / "one", tmp_path / "many"
    workflows.sample(num_samples=5, out=one, batch_size=1, **asked)
    workflows.sample(num_samples=5, out=many, batch_size=64, **asked)
    images = [np.asarray(_read(folder, 4), dtype=int) for folder in (one, many)]
    assert np.abs(images[0] - images[1]).max() <= 1  # kernels of other sizes round differently
    before = png_hashes(many)
    workflows.sample(num_samples=8, out=many, batch_size=64, **asked)
    assert png_hashes(many)[:5] == before
    assert len(png_hashes(many)) == 8


def _read(folder: Path, index: int):
    from PIL import Image

    return Image.open(folder / f"{index:06d}.png")


def test_an_interrupted_sampling_goes_on(home, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    asked = {"num_samples": 6, "batch_size": 2, "device": "cpu"}
    workflows.sample(out=whole, **asked)
    workflows.sample(out=broken, **asked)
    for index in (2, 3):
        (broken / f"{index:06d}.png").unlink()
    (broken / "samples.jsonl").unlink()
    workflows.sample(out=broken, **asked)
    assert png_hashes(broken) == png_hashes(whole)
    rows = [json.loads(line) for line in (broken / "samples.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rows] == [0, 1, 2, 3, 0, 1]
    assert rows[0]["model_sha256"] == sha256_file(
        home / "runs/lm-embedded-shapes/export/model.safetensors"
    )


def test_asking_for_fewer_forgets_no_sample(home, tmp_path):
    """A second, smaller request once left 6 images with 2 rows, and evaluation without labels."""
    for count in (6, 2):
        workflows.sample(num_samples=count, out=tmp_path / "s", device="cpu")
    rows = (tmp_path / "s" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == len(png_hashes(tmp_path / "s")) == 6


def test_settings_give_folders_of_their_own(home):
    folders = {
        workflows.sample(num_samples=1, dry_run=True, device="cpu", **settings).files["samples"]
        for settings in (
            {},
            {"guidance_schedule": "linear"},
            {"solver": "ddpm"},
            {"num_inference_steps": 3},
            {"guidance_scale": 4.0},
            {"seed": 1},
            {"classes": ["circle"]},
        )
    }
    assert len(folders) == 7


def test_a_hub_model_is_found_in_the_hub_cache(home, tmp_path, monkeypatch):
    """The layout that huggingface_hub keeps: models--ORG--NAME/snapshots/REVISION."""
    revision = "0" * 40
    cache = tmp_path / "hub"
    repository = cache / "models--someone--shapes"
    shutil.copytree(home / "runs/lm-embedded-shapes/export", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    drawn = workflows.sample(
        model="someone/shapes", num_samples=2, out=tmp_path / "s", device="cpu"
    )
    assert drawn.figures["samples"] == 2
    assert "someone--shapes" in drawn.figures["model"]


def test_results_are_found_in_the_workspace_by_the_names_of_the_design_card(home, tmp_path):
    for spec in ("runs/lm-embedded-shapes", "lm-embedded-shapes"):
        plan = workflows.sample(model=spec, dry_run=True, device="cpu")
        assert plan.figures["model"] == str(home / "runs/lm-embedded-shapes/export")
    assert workflows.train_lm(data="latents/embedded-shapes", dry_run=True, device="cpu")


def test_a_folder_of_other_samples_is_refused(home, tmp_path):
    workflows.sample(num_samples=2, out=tmp_path / "s", seed=1, device="cpu")
    with pytest.raises(ArtifactError, match=r"other settings \(seed differ"):
        workflows.sample(num_samples=2, out=tmp_path / "s", seed=2, device="cpu")


def test_an_npz_is_as_adm_reads_it(home, tmp_path):
    workflows.sample(num_samples=4, out=tmp_path / "s", npz=True, device="cpu")
    with np.load(tmp_path / "s" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (4, 32, 32, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3]


def test_evaluation_names_its_protocol(home):
    workflows.sample(num_samples=8, device="cpu")
    result = workflows.evaluate_samples(
        metrics=["fid", "kid"], extractor=str(home / "judge"), device="cpu"
    )
    protocol = result.details["protocol"]
    assert protocol["num_samples"] == 8
    assert protocol["reference"] == DATA
    assert protocol["label_policy"] == "balanced"
    assert Path(result.files["report"]).is_file()
    assert any("fewer than 2048" in warning for warning in result.details["warnings"])


def test_a_dit_walks_the_same_path(home, tmp_path):
    trained = workflows.train_lm(
        recipe="dit-tiny", overrides=FEW, out=tmp_path / "dit", device="cpu"
    )
    assert trained.title == "dit trained"
    drawn = workflows.sample(
        model=str(tmp_path / "dit"), num_samples=3, out=tmp_path / "s", device="cpu"
    )
    assert drawn.figures["samples"] == 3
    assert len(png_hashes(tmp_path / "s")) == 3


def test_reconstruction_statistics_and_sweep(home, tmp_path):
    judge = {"extractor": str(home / "judge"), "device": "cpu"}
    made = workflows.make_statistics(data=DATA, image_size=32, out=tmp_path / "s.npz", **judge)
    assert made.figures["images"] == 256
    rebuilt = workflows.evaluate_reconstruction(data=DATA, num_samples=16, offline=True, **judge)
    assert {"psnr", "ssim", "std_mean", "noise_to_signal"} <= rebuilt.figures.keys()
    swept = workflows.sweep(
        scales=[1.0, 2.0],
        steps=[2],
        num_samples=8,
        reference=str(tmp_path / "s.npz"),
        out=tmp_path,
        **judge,
    )
    assert len(swept.details["rows"]) == 2
    assert (tmp_path / "sweep.png").is_file()


def test_a_dry_run_touches_nothing(home, tmp_path):
    out = tmp_path / "new"
    for plan in (
        workflows.train_vae(data=DATA, out=out, dry_run=True, device="cpu"),
        workflows.train_lm(out=out, dry_run=True, device="cpu"),
        workflows.tokenize(data=DATA, out=out, dry_run=True, device="cpu"),
        workflows.sample(out=out, dry_run=True, device="cpu"),
    ):
        assert plan.title.startswith("Plan")
    assert not out.exists()


def test_bad_input_gets_a_sentence(home, tmp_path):
    with pytest.raises(DataError, match="classes are 0 to 3"):
        workflows.sample(classes=["7"], device="cpu")
    with pytest.raises(DataError, match="Did you mean circle"):
        workflows.sample(classes=["circel"], device="cpu")
    with pytest.raises(ConfigError, match="allows 1 to 999"):
        workflows.sample(num_inference_steps=1000, device="cpu")
    with pytest.raises(ArtifactError, match="neither a run, an export nor a hub id"):
        workflows.sample(model=str(tmp_path), device="cpu")
    with pytest.raises(LatentLMError, match="no latentset"):
        workflows.train_lm(data="latentset", device="cpu")


def test_latents_of_another_tokenizer_are_refused(home, tmp_path):
    other = workflows.train_vae(
        data=DATA, overrides=[*FEW, "trainer.seed=9"], out=tmp_path / "vae", device="cpu"
    )
    with pytest.raises(DataError, match="tokenizer"):
        workflows.tokenize(
            data=DATA,
            vae=other.files["export"],
            out=home / "latents/embedded-shapes",
            device="cpu",
        )
    with pytest.raises(ArtifactError, match="is not the tokenizer"):
        workflows.sample(vae=other.files["export"], out=tmp_path / "s", device="cpu")


def test_an_unfinished_run_is_named_as_such(home, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    with pytest.raises(ArtifactError, match="not finished"):
        workflows.sample(model=str(run), device="cpu")
