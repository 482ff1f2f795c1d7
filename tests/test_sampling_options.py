"""``--mode`` and ``--dtype``, options that do nothing, and what a folder keeps of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core import workflows
from latentlm_core.artifacts import save_generator
from latentlm_core.errors import ArtifactError, ConfigError
from latentlm_core.export_config import GeneratorExport, read_config
from latentlm_core.models.dit import DiT, DiTSize
from latentlm_core.models.few_step import FewStepConfig
from latentlm_core.sampling import SamplerConfig
from latentlm_core.workflows import drawing, sampling_plan
from latentlm_core.workflows.sampling_plan import SamplingPlan, weight_dtype
from tests import tiny_evaluation, tiny_multimodal
from tests.test_models import tiny_latent_lm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models of classes: ``lm``, ``dit`` and ``few``, whose head is a few-step one."""
    folder = tmp_path_factory.mktemp("home")
    tiny_evaluation.make_home(folder)
    size = DiTSize(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64)
    few = tiny_latent_lm(few_step=FewStepConfig())
    config = read_config(folder / tiny_evaluation.LM, GeneratorExport)
    for name, model, sampler in (
        ("dit", DiT(size.complete((4, 4), 8, 11)), config.sampler),
        ("few", few, SamplerConfig(num_inference_steps=2, solver="few-step")),
    ):
        changed = config.model_copy(update={"model": model.config, "sampler": sampler})
        save_generator(folder / f"runs/{name}/export", model, changed, folder / tiny_evaluation.VAE)
    return folder


@pytest.fixture(autouse=True)
def _workspace(home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(home))


def sample(out: Path | None = None, **settings: Any) -> Any:
    usual = {"model": "lm", "num_samples": 2, "device": "cpu"}
    return workflows.sample(out=out, **{**usual, **settings})


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "settings.json").read_text())


# --- dtype and mode --------------------------------------------------------------------------


def test_auto_is_bfloat16_where_a_gpu_has_it(monkeypatch):
    for is_able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(sampling_plan, "has_bfloat16", lambda device, able=is_able: able)
        assert weight_dtype("auto", CUDA) == expected
        assert weight_dtype("auto", CPU) == torch.float32
        assert weight_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="bfloat16 is not built into cuda"):
        weight_dtype("bfloat16", CUDA)


@pytest.mark.parametrize("model", ["lm", "dit"])
def test_weights_are_of_the_dtype_and_the_decoder_is_not(monkeypatch, tmp_path, model):
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    decode = drawing.decode_images

    def spy(loaded, tokenizer, latents):
        dtypes = [next(part.parameters()).dtype for part in (loaded.model, tokenizer)]
        seen.append((*dtypes, latents.dtype))
        return decode(loaded, tokenizer, latents)

    monkeypatch.setattr(drawing, "decode_images", spy)
    made = sample(tmp_path, model=model, dtype="bfloat16")
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)]
    assert (made.figures["dtype"], made.figures["mode"]) == ("bfloat16", "eager")
    assert (settings_of(tmp_path)["dtype"], settings_of(tmp_path)["mode"]) == ("bfloat16", "auto")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_pages_are_written_in_bfloat16(multimodal_home, monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTLM_HOME", str(multimodal_home))
    for model in ("pages", "transfusion"):
        asked = {"model": model, "prompts": ["a red"], "dtype": "bfloat16"}
        tiny_multimodal.write(tmp_path / model, **asked)
        (row,) = tiny_multimodal.rows_of(tmp_path / model)
        assert (row["file"], row["dtype"]) == ("000000.png", "bfloat16")


def test_another_dtype_is_another_folder_and_another_mode_is_not(tmp_path):
    sample(tmp_path, mode="eager")
    sample(tmp_path, mode="auto", num_samples=3)
    assert settings_of(tmp_path)["mode"] == "auto"
    with pytest.raises(ArtifactError, match=r"other settings \(dtype differ"):
        sample(tmp_path, dtype="bfloat16")
    names = [
        Path(sample(dry_run=True, **asked).files["samples"]).name
        for asked in ({}, {"mode": "eager"}, {"dtype": "float32"}, {"dtype": "bfloat16"})
    ]
    assert names[0] == names[1] == names[2] != names[3]
    assert names[3].endswith("-bfloat16-seed0")


def test_pages_of_another_mode_share_a_folder(multimodal_home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(multimodal_home))
    names = [
        tiny_multimodal.write(prompts=["a"], dry_run=True, **asked).files["samples"]
        for asked in ({}, {"mode": "eager"}, {"dtype": "bfloat16"})
    ]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "dtype differ"),
        ({"guidance_interval": (0.2, 0.8), "guidance_scale": 2.0}, "sampler differ"),
    ],
)
def test_a_folder_without_a_key_is_one_of_its_default(tmp_path, settings, told):
    """Folders that were begun before these options were there go on."""
    sample(tmp_path)
    old = settings_of(tmp_path)
    del old["dtype"], old["mode"], old["sampler"]["guidance_interval"]
    (tmp_path / "settings.json").write_text(json.dumps(old))
    if told is None:
        sample(tmp_path, num_samples=3)
        assert len(list(tmp_path.glob("0*.png"))) == 3
        assert settings_of(tmp_path)["dtype"] == "float32"
    else:
        with pytest.raises(ArtifactError, match=told):
            sample(tmp_path, **settings)


def test_a_decoder_takes_a_bounded_number_of_pixels(monkeypatch, tmp_path):
    sample(tmp_path / "whole", num_samples=5)
    monkeypatch.setattr(drawing, "MAX_PIXELS", 2 * 32 * 32)
    sizes: list[int] = []
    to_images = drawing.to_images
    monkeypatch.setattr(drawing, "to_images", lambda m: sizes.append(len(m)) or to_images(m))
    sample(tmp_path / "parts", num_samples=5)
    assert sizes == [2, 2, 1]
    for name in ("000000.png", "000004.png"):
        whole, part = (
            np.asarray(Image.open(tmp_path / kind / name), dtype=int) for kind in ("whole", "parts")
        )
        assert np.abs(whole - part).max() <= 1


def test_a_sweep_has_both_options(home, tmp_path):
    found = workflows.sweep(
        scales=[1.0],
        steps=[2],
        model="lm",
        reference="embedded:shapes",
        num_samples=4,
        extractor=str(home / "judge"),
        mode="eager",
        dtype="bfloat16",
        out=tmp_path,
        device="cpu",
    )
    assert (found.details["mode"], found.details["dtype"]) == ("eager", "bfloat16")


# --- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--mode graph", "--mode graph captures a CUDA graph, and the device is cpu"),
        ("--model dit --mode compile", "A DiT has no decode step"),
        ("--model dit --cfg 2 --cfg-schedule linear", "A DiT draws all positions together"),
        ("--model dit --cfg 2 --guidance-interval 0.2 0.8", "A DiT knows no guidance interval"),
        ("--model lm --solver few-step", "needs a model whose head was distilled"),
        ("--model few --steps 20", "was distilled for 1, 2, 4 steps, not 20"),
        ("--model few --cfg 3", "no changing its guidance_scale 1.0 to 3.0"),
        ("--model few --solver ddpm", "its solver is few-step, not ddpm"),
        ("--model lm --cfg 1 --cfg-schedule linear", "with a scale of 1 there is none"),
        ("--model lm --cfg 1 --guidance-interval 0.2 0.8", "with a scale of 1 there is none"),
        ("--model lm --class nothing", "nothing"),
        ("--model lm --text hi", "is class-conditional, so it cannot read a text aloud"),
        ("--model lm --prompt hi", "this needs a model of text and images"),
        ("--model speech --text a --text b --stream", "--stream writes one sample"),
        ("--model speech --protocol 3s-prefix --data x --stream", "ask for all of a data set"),
        ("--text-only a -n 2", "would be the same"),
    ],
)
def test_impossible_pairs_are_refused_before_weights_are_read(monkeypatch, line, told):
    monkeypatch.setattr(SamplingPlan, "load", None)
    done = CliRunner().invoke(app, f"sample --device cpu {line}")
    assert (done.exit_code, done.stdout) == (1, ""), done.exception
    assert told in done.stderr


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--prompt a --temperature 1", "--temperature is of words, and this draws images"),
        ("--prompt a --max-tokens 9", "--max-tokens is of words"),
        ("--data x --top-p 0.5", "--top-p is of words"),
        ("--text-only a --cfg 2", "--cfg is of images, and this writes words alone"),
        ("--caption a.png --steps 2", "--steps is of images"),
        ("--ask a --image a.png --solver ddpm", "--solver is of images"),
        ("--text-only a --top-p 0.5", "without --temperature the likeliest is taken"),
        ("--interleaved a.json --temperature 0 --top-p 0.5", "the likeliest is taken"),
        ("--mode fast", "--mode"),
        ("--dtype float16", "--dtype"),
    ],
)
def test_options_that_would_do_nothing_are_wrong_usage(line, told):
    done = CliRunner().invoke(app, f"sample {line}")
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.replace("\u2502", " ").split())
