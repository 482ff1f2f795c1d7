"""What commands of text and images refuse: one sentence each, and a non-zero exit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core import workflows
from latentlm_core.artifacts import build_generator, save_generator
from latentlm_core.data.media import write_png
from latentlm_core.errors import ArtifactError
from latentlm_core.export_config import GeneratorExport
from latentlm_core.files import read_safetensors, sha256_file, write_json, write_safetensors
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.tokenizers.text import TextConfig, TextTokenizer
from tests.test_models import tiny_latent_lm
from tests.tiny_latents import vouch
from tests.tiny_multimodal import ROW_LENGTH, TRANSFUSION, mix_of, write
from tests.tiny_pretrained import write as write_checkpoint

runner = CliRunner()


@pytest.fixture(scope="module")
def home(multimodal_home, tmp_path_factory) -> Path:
    """The workspace, and beside it a class-conditional model and sets of other tokenizers."""
    folder: Path = tmp_path_factory.mktemp("beside")
    vae = multimodal_home / "runs/vae/export"
    export = GeneratorExport(
        model=tiny_latent_lm(latent_channels=3).config,
        stats=LatentStats(shift=(0.0,), scale=(1.0,)),
        grid=(2, 2),
        classes=tuple("0123456789"),
        tokenizer_sha256=sha256_file(vae / "model.safetensors"),
    )
    save_generator(folder / "classes", build_generator(export.model), export, vae)
    other = shutil.copytree(vae, folder / "vae")
    weights = read_safetensors(other / "model.safetensors")
    weights["decoder.head.norm.weight"] += 1
    write_safetensors(other / "model.safetensors", weights, {"format": "pt"})
    vouch(other)
    data = str(multimodal_home / "shapes")
    workflows.tokenize(data=data, vae=str(other), out=folder / "other", device="cpu")
    write_png(folder / "small.png", np.zeros((8, 40, 3), np.uint8))
    write_png(folder / "fine.png", np.zeros((16, 16, 3), np.uint8))
    write_png(folder / "plain/0.png", np.zeros((16, 16, 3), np.uint8))
    (folder / "broken.png").write_bytes(b"\x89PNG and nothing")
    return folder


@pytest.fixture(autouse=True)
def _workspace(home, multimodal_home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(multimodal_home))
    monkeypatch.chdir(home)


def refused(*line: str, code: int = 1) -> str:
    """What a command says that refuses; it left nothing behind."""
    shutil.rmtree("out", ignore_errors=True)
    done = runner.invoke(app, [str(word) for word in line])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error") == 1
    assert not Path("out").exists()
    return " ".join(done.stderr.replace("\u2502", " ").split())


def sample(*line: str, model: str = "pages", code: int = 1) -> str:
    where = ("--model", model, "--device", "cpu", "--out", "out")
    return refused("sample", *line, *where, code=code)


def train(mix: str, *line: str, recipe: str, code: int = 1) -> str:
    where = ("--recipe", recipe, "--device", "cpu", "--out", "out")
    return refused("train-lm", "--data", mix, *line, *where, code=code)


# --- prompts ---------------------------------------------------------------------------------

LONG = "word " * 30


@pytest.mark.parametrize("model", ["pages", "transfusion"])
@pytest.mark.parametrize(
    ("line", "size"),
    [
        (["--prompt", LONG], "152 elements and an image 4 more"),
        (["--text-only", LONG], "151 elements"),
        (["--ask", LONG, "--image", "fine.png"], "158 elements"),
    ],
)
def test_a_prompt_longer_than_the_context(model, line, size):
    said = sample(*line, model=model)
    assert f"has {size}, and the model knows documents of {ROW_LENGTH} at most" in said
    assert "data.row_length" in said


def test_a_prompt_that_leaves_no_room_for_its_image():
    """It fits in itself, and so does a prompt that is one byte shorter, with its image."""
    room = ROW_LENGTH - 2 - 4 - 1
    assert "documents of 96" in sample("--prompt", "a" * (room + 1))
    write(dry_run=True, prompts=["a" * room])


@pytest.mark.parametrize(
    "line", [["--caption", "small.png"], ["--ask", "which?", "--image", "small.png"]]
)
def test_an_image_of_a_size_that_the_tokenizer_cannot_take(line):
    said = sample(*line)
    assert "An image of small.png is 40x8, and the tokenizer takes 16x16" in said


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--caption", "broken.png"], "broken.png"),
        (["--caption", "nothing.png"], "nothing.png"),
        (["--ask", "which?"], "--ask is a question about each --image"),
        (["--image", "fine.png"], "--ask is a question about each --image"),
        (["--prompt", "a", "--image", "fine.png"], "--prompt and --ask exclude each other"),
        (["--prompt", "a", "--caption", "fine.png"], "--prompt and --caption exclude each other"),
        (["--prompt", "a", "--data", "x"], "--prompt and --data exclude each other"),
        (["--temperature", "0.5"], "There is no prompt: name one of --prompt, --caption"),
        (["--data", "nothing"], "nothing"),
        (["--data", "plain", "--split", "train"], "0.png of plain has no caption to draw"),
        (["--prompt", "a", "--vae", "vae"], "is not the tokenizer that"),
        (["--prompt", "a", "--model", "vae"], "holds a sigma-vae, where a generator is wanted"),
        (["--text-only", "a", "--top-p", "0", "--temperature", "1"], "top_p"),
        (["--prompt", "a", "--cfg", "inf"], "guidance_scale"),
    ],
)
def test_wrong_prompts_get_a_sentence(line, sentence):
    if "--model" in line:
        said = refused("sample", *line, "--device", "cpu", "--out", "out")
    else:
        said = sample(*line)
    assert sentence in said


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--prompt", "a", "--npz"], "--npz is for classes, and not for text and images"),
        (["--prompt", "a", "--class", "3"], "--class is for classes, and not for text and images"),
        (["--prompt", "a", "--voice", "a.wav"], "--voice is for speech"),
        (["--prompt", "a", "--split", "train"], "--split is a part of --data"),
        (["--text", "a", "--prompt", "b"], "--prompt is for other models"),
        (["--text-only", "a", "--top-p", "2"], "--top-p"),
        (["--text-only", "a", "--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_wrong_usage_exits_with_2(line, sentence):
    assert sentence in sample(*line, code=2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no file page.json"),
        ("", "is not valid JSON"),
        ('["a', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"pieces": ["a"]}', "is no list of pieces"),
        ('["a", 3]', "Piece 2 of page.json is neither words, an image nor a question"),
        (
            '[{"picture": "fine.png"}]',
            "Piece 1 of page.json is neither words, an image nor a question",
        ),
        (
            '[{"image": "fine.png", "question": "a"}]',
            "Piece 1 of page.json is neither words, an image nor a question",
        ),
        ('[{"image": 3}]', "Piece 1 of page.json is neither words, an image nor a question"),
        ('["a", {"image": "nothing.png"}]', "nothing.png"),
        ('["a", {"image": "broken.png"}]', "broken.png"),
        ('["a", {"image": "small.png"}]', "is 40x8, and the tokenizer takes 16x16"),
        (json.dumps([LONG]), "page.json has 151 elements"),
    ],
)
def test_an_interleaved_page_that_is_none(home, text, sentence):
    page = home / "page.json"
    page.unlink(missing_ok=True)
    if text is not None:
        page.write_text(text)
    assert sentence in sample("--interleaved", "page.json")


# --- models of other kinds -------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ["sample", "--prompt", "a red seven"],
        ["sample", "--caption", "fine.png"],
        ["sample", "--text-only", "a"],
        ["eval", "ppl", "--data", "pydoc"],
        ["eval", "caption", "--data", "embedded:shapes"],
        ["eval", "vqa", "--data", "embedded:shapes"],
    ],
)
def test_a_class_conditional_model_says_which_options_it_takes(line):
    said = refused(*line, "--model", "classes", "--device", "cpu", "--out", "out")
    assert "is class-conditional, and this needs a model of text and images" in said
    assert "latentlm sample takes --class, -n, --cfg" in said


@pytest.mark.parametrize("line", [["--class", "3"], [], ["--class", "a", "--npz"]])
def test_a_model_of_text_and_images_has_no_classes(line):
    said = sample(*line)
    assert "a model of text and images, which has no classes" in said
    assert "It takes --prompt, --caption, --ask" in said


def test_a_model_of_text_and_images_says_nothing_aloud():
    said = sample("--text", "three one four")
    assert "is a model of text and images, so it cannot read a text aloud" in said
    assert "It takes --prompt, --caption, --ask" in said


def test_an_export_whose_parts_disagree(multimodal_home, tmp_path):
    export = shutil.copytree(multimodal_home / "runs/pages/export", tmp_path / "export")
    (export / "text.json").write_text(TextTokenizer(TextConfig(normalise="words")).to_json())
    assert "is not the text tokenizer of the model" in sample("--prompt", "a", model=str(export))
    config = json.loads((export / "config.json").read_text())
    for change, sentence in (
        ({"max_length": None}, "max_length is that of a model of text and images"),
        ({"model": config["model"] | {"predicts_text": False}}, "one that predicts text"),
        ({"grid": None}, "grid and tokenizer_sha256 go together"),
    ):
        write_json(export / "config.json", config | change)
        assert sentence in sample("--prompt", "a", model=str(export))


def test_a_transfusion_whose_parts_disagree(multimodal_home, tmp_path):
    export = shutil.copytree(multimodal_home / "runs/transfusion/export", tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    for change, sentence in (
        ({"model": config["model"] | {"num_latents": 9}}, "num_latents 9 is not that of the grid"),
        ({"text_sha256": None, "max_length": None}, "a Transfusion is a model of text and images"),
    ):
        write_json(export / "config.json", config | change)
        assert sentence in sample("--prompt", "a", model=str(export))


def test_a_model_that_draws_no_numbers_is_named(multimodal_home, tmp_path):
    broken = shutil.copytree(multimodal_home / "runs/pages/export", tmp_path / "export")
    weights = read_safetensors(broken / "model.safetensors")
    weights["head.final.projection.weight"].fill_(float("nan"))
    write_safetensors(broken / "model.safetensors", weights, {"format": "pt"})
    vouch(broken)
    with pytest.raises(ArtifactError, match="drew latents that are not finite"):
        write(tmp_path / "s", prompts=["a"], model=str(broken))


# --- training --------------------------------------------------------------------------------


@pytest.fixture
def recipe(multimodal_home) -> str:
    return str(multimodal_home / "pages.json")


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        ("latents/shapes,,text:pydoc", "has an empty part"),
        ("text:,latents/shapes", "has an empty part"),
        ("interleaved:latents/shapes+,text:pydoc", "has an empty part"),
        ("latents/shapes=0,text:pydoc=0", "sum to zero"),
        ("latents/shapes=-1,text:pydoc=2", "The weight of latents/shapes is -1"),
        ("latents/nothing,text:pydoc", "There is no latents/nothing"),
        ("latents/shapes,text:nothing", "There is no set of texts 'nothing'"),
        ("latents/shapes,text:nothing.txt", "There is no file or folder nothing.txt"),
        ("interleaved:latents/shapes+nothing.jsonl", "nothing.jsonl cannot be read"),
        ("latents/shapes,other", "were made by different tokenizers, whose latents do not mix"),
        ("text:plain,latents/shapes", "plain"),
    ],
)
def test_a_mix_that_is_none(recipe, mix, sentence):
    assert sentence in train(mix, recipe=recipe)


def test_a_row_too_short_for_any_image(recipe):
    said = train("latents/shapes,text:pydoc", "--set", "data.row_length=8", recipe=recipe)
    assert "No document of shapes fits in a row of 8 elements" in said
    assert "--set data.row_length=" in said


def test_recipes_and_data_must_be_of_one_kind(home, multimodal_home, recipe):
    mix = mix_of(multimodal_home)
    assert "learns from one latent set, and --data names a mix" in train(mix, recipe="tiny")
    dit = json.loads(Path(recipe).read_text())
    dit["model"] = {"kind": "dit", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    dit["model"] |= {"intermediate_size": 32}
    write_json(home / "dit.json", dit)
    assert "A DiT takes images of classes" in train(mix, recipe="dit.json")
    noisy = json.loads(Path(recipe).read_text()) | {"model": TRANSFUSION}
    write_json(home / "noisy.json", noisy)
    said = train("text:pydoc", recipe="noisy.json")
    assert "A Transfusion learns from images; text alone needs latent-lm" in said
    write_json(home / "noisy.json", noisy | {"data": {"kind": "classes"}})
    said = train("latents/shapes", recipe="noisy.json")
    assert "A Transfusion learns from text and images" in said


def test_a_language_model_begins_recipes_of_text_alone(home, multimodal_home, recipe):
    write_checkpoint(home / "llama")
    begin = ("--init", "llama")
    said = train("latents/shapes", *begin, recipe="tiny")
    assert "--init begins with a language model, and this recipe is not of text and images" in said
    assert "--recipe multimodal-1.3b" in said
    change = ("--set", "model.backbone.num_layers=3")
    said = train("latents/shapes", *begin, *change, recipe=recipe)
    assert "--init decides model.backbone and data.text" in said
    said = train("latents/shapes", "--init", "nothing-there", recipe=recipe)
    assert "nothing-there" in said
