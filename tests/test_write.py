"""Samples on a tiny real path: every kind of prompt, files, resuming, batches, streaming."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core.artifacts import load_generator
from latentlm_core.data.media import read_image, write_png
from latentlm_core.errors import ArtifactError
from latentlm_core.progress import SILENT
from latentlm_core.sampling import SamplerConfig, TextSamplerConfig
from latentlm_core.workflows.tasks import interleaved_task
from latentlm_core.workflows.writing import Writing
from tests.tiny_latents import Interrupting, content
from tests.tiny_multimodal import NUM_LATENTS, ROW_LENGTH, rows_of, write

HOT = {"temperature": 1.0, "max_tokens": 12}
METADATA = "train/metadata.jsonl"
MODELS = ("pages", "transfusion")
FILES = ("captions_of", "images")


@pytest.fixture(autouse=True)
def _workspace(multimodal_home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(multimodal_home))


@pytest.fixture
def shapes(multimodal_home) -> Path:
    return multimodal_home / "shapes/test"


def pixels(path: Path) -> np.ndarray:
    return read_image(path, str(path)).astype(int)


def page_in(folder: Path) -> Path:
    """A JSON file of words, an image and a question."""
    page = ["a ", {"image": "00.png"}, {"question": "which shape?"}]
    (folder / "page.json").write_text(json.dumps(page))
    return folder / "page.json"


def settings_of(kind: str, shapes: Path, folder: Path) -> dict[str, Any]:
    if kind == "interleaved":
        folder.mkdir(exist_ok=True)
        (folder / "00.png").write_bytes((shapes / "00.png").read_bytes())
    return {
        "prompt": lambda: {"prompts": ["a red circle", ""]},
        "caption": lambda: {"captions_of": [shapes / "00.png", shapes / "01.png"], **HOT},
        "ask": lambda: {"question": "which shape?", "images": [shapes / "00.png"], **HOT},
        "text-only": lambda: {"text_only": ["text 1", ""], **HOT},
        "interleaved": lambda: {"interleaved": page_in(folder), **HOT},
        "data": lambda: {"data": str(shapes.parent), "split": "train", "num_samples": 3},
    }[kind]()


KINDS = ("prompt", "caption", "ask", "text-only", "interleaved", "data")


# --- kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prompt_makes_pages(shapes, tmp_path, kind, model):
    out = tmp_path / "s"
    made = write(out, model=model, **settings_of(kind, shapes, tmp_path / "in"))
    rows = rows_of(out)
    counts = {"prompt": 2, "caption": 2, "ask": 1, "text-only": 2, "interleaved": 1, "data": 3}
    assert len(rows) == made.figures["samples"] == counts[kind]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    prompts = {
        "prompt": ["a red circle", ""],
        "caption": ["", ""],
        "ask": ["which shape?"],
        "text-only": ["text 1", ""],
        "interleaved": ["a \nwhich shape?"],
    }
    if kind in prompts:
        assert [row["prompt"] for row in rows] == prompts[kind]
    for row in rows:
        page = json.loads((out / f"{row['index']:06d}.json").read_text())
        assert page.items() <= row.items()
        assert row["model_sha256"] == made.details["model_sha256"]
        names = [piece["image"] for piece in row["pieces"] if isinstance(piece, dict)]
        assert row["file"] == (names[0] if names else None)
        assert row["text"] == "\n".join(piece for piece in row["pieces"] if isinstance(piece, str))
        assert [pixels(out / name).shape for name in names] == [(16, 16, 3)] * len(names)
        if kind in ("prompt", "data"):
            assert names == [f"{row['index']:06d}.png"]
            assert (row["text"], row["ended_by"]) == ("", "end")
        else:
            assert 0 < len(row["text"]) <= 12
    drawn = sorted(path.name for path in out.glob("*.png") if path.name != "grid.png")
    told = [p["image"] for row in rows for p in row["pieces"] if isinstance(p, dict)]
    assert drawn == sorted(told)
    assert ("grid" in made.files) == (out / "grid.png").is_file() == bool(told)
    written = {str(row["index"]): row["text"] for row in rows if row["text"]}
    assert made.figures.get("text") == (written.get("0") if len(rows) == 1 else written or None)


def test_the_captions_of_a_set_are_drawn_from_all_over_it(shapes, tmp_path):
    data = {"data": str(shapes.parent), "split": "train"}
    write(tmp_path / "s", **data, num_samples=2)
    rows = [json.loads(line) for line in (shapes.parent / METADATA).read_text().splitlines()]
    captions = [row["prompt"] for row in rows_of(tmp_path / "s")]
    known = {row["text"]: row["file_name"] for row in rows}
    assert [known[caption] for caption in captions] == ["00.png", "15.png"]


def test_prompts_and_images_decide_the_pages(shapes, tmp_path):
    write(tmp_path / "a", prompts=["a red circle"])
    write(tmp_path / "b", prompts=["a blue square"])
    assert np.abs(pixels(tmp_path / "a/000000.png") - pixels(tmp_path / "b/000000.png")).max() > 1
    answers, many = [], {"num_samples": 80, "temperature": 1.0, "max_tokens": 60}
    for level in (0, 255):
        out, image = tmp_path / str(level), tmp_path / f"{level}.png"
        write_png(image, np.full((16, 16, 3), level, np.uint8))
        write(out, question="which?", images=[image], **many)
        answers.append([row["text"] for row in rows_of(out)])
    assert answers[0] != answers[1]


def test_a_larger_image_is_cropped(shapes, tmp_path):
    image = read_image(shapes / "00.png", "0")[8:24, 8:24]
    write_png(tmp_path / "small.png", image)
    write_png(tmp_path / "large.png", np.pad(image, ((0, 0), (8, 8), (0, 0))))
    for name, file in (("a", "small.png"), ("b", "large.png")):
        write(tmp_path / name, captions_of=[tmp_path / file], **HOT)
    assert rows_of(tmp_path / "a")[0]["text"] == rows_of(tmp_path / "b")[0]["text"]


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "caption", "interleaved"])
def test_what_was_deleted_is_made_again_and_nothing_else(shapes, tmp_path, kind):
    out = tmp_path / "s"
    asked = settings_of(kind, shapes, tmp_path / "in") | {"num_samples": 3, "batch_size": 1}
    write(out, **asked)
    before = content(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.json")}
    for path in out.glob("000001*"):
        path.unlink()
    (out / "samples.jsonl").unlink()
    write(out, **asked)
    assert content(out) == before
    changed = {
        path.name for path in out.glob("0*.json") if path.stat().st_mtime_ns != times[path.name]
    }
    assert changed == {"000001.json"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["prompt", "caption", "text-only"])
def test_a_page_does_not_depend_on_the_batch(shapes, tmp_path, kind, model):
    asked = settings_of(kind, shapes, tmp_path) | {"num_samples": 3, "seed": 5, "model": model}
    write(tmp_path / "one", batch_size=1, **asked)
    write(tmp_path / "many", batch_size=64, **asked)
    one, many = rows_of(tmp_path / "one"), rows_of(tmp_path / "many")
    assert one == many
    for row in one:
        if row["file"]:
            ours, other = (pixels(tmp_path / name / row["file"]) for name in ("one", "many"))
            assert np.abs(ours - other).max() <= 1
    assert len({json.dumps(row["pieces"]) for row in one}) > 1


def test_more_samples_of_the_same_prompts_only_add_files(tmp_path):
    """Every prompt in turn, so the pages that are there stay what they are."""
    asked = {"prompts": ["a red circle", "a blue square"]}
    write(tmp_path, **asked)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("0*")}
    write(tmp_path, num_samples=2, **asked)
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == asked["prompts"] * 2
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert pixels(tmp_path / "000000.png").tolist() != pixels(tmp_path / "000002.png").tolist()
    fewer = write(tmp_path, **asked)
    assert fewer.figures["samples"] == 2
    assert len(rows_of(tmp_path)) == 4


def test_fewer_samples_leave_a_gap_alone(tmp_path):
    write(tmp_path, prompts=["a"], num_samples=4)
    (tmp_path / "000002.json").unlink()
    write(tmp_path, prompts=["a"], num_samples=1)
    assert [row["index"] for row in rows_of(tmp_path)] == [0, 1, 3]


def test_a_folder_of_other_settings_is_refused(shapes, tmp_path):
    write(tmp_path, prompts=["a"])
    for change, name in (
        ({"prompts": ["b"]}, "prompts"),
        ({"seed": 1}, "seed"),
        ({"guidance_scale": 3.0}, "sampler"),
        ({"temperature": 0.5}, "text_sampler"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"model": "transfusion"}, "model_sha256"),
    ):
        with pytest.raises(ArtifactError, match=rf"other settings \({name} differ"):
            write(tmp_path, **{"prompts": ["a"], **change})


def test_another_image_is_another_prompt(shapes, tmp_path):
    write(tmp_path, captions_of=[shapes / "00.png"], **HOT)
    with pytest.raises(ArtifactError, match=r"other settings \(prompts differ"):
        write(tmp_path, captions_of=[shapes / "01.png"], **HOT)


def test_settings_give_folders_of_their_own_and_a_dry_run_makes_none(shapes):
    settings = [
        {"prompts": ["a"]},
        {"prompts": ["a"], "seed": 1},
        {"prompts": ["a", "b"]},
        {"prompts": ["and/or"]},
        {"prompts": ["word " * 9]},
        {"text_only": ["a"]},
        {"captions_of": [shapes / "00.png"]},
        {"captions_of": [shapes / "01.png"]},
        {"question": "a", "images": [shapes / "00.png"]},
        {"data": str(shapes.parent), "num_samples": 2},
        {"data": str(shapes.parent), "num_samples": 3},
    ]
    folders = {write(dry_run=True, **each).files["samples"] for each in settings}
    assert len(folders) == len(settings)
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prompts": ["a red/blue seven"]}, "a-red-blue-seven"),
        ({"prompts": [""]}, "nothing"),
        ({"prompts": ["word " * 12]}, "-".join(["word"] * 8)),
        ({"captions_of": ["00.png", "01.png"]}, "00"),
        ({"question": "which digit?", "images": ["00.png"]}, "which-digit"),
    ],
)
def test_a_folder_is_called_after_what_was_asked(shapes, settings, name):
    settings |= {k: [shapes / n for n in settings[k]] for k in settings if k in FILES}
    folder = Path(write(dry_run=True, **settings).files["samples"])
    assert folder.name.rpartition("-")[0] == f"pages-{name}"


def test_the_same_words_to_draw_and_to_go_on_with_do_not_share_a_folder(tmp_path):
    write(tmp_path, prompts=["a"])
    with pytest.raises(ArtifactError, match="holds samples of other settings"):
        write(tmp_path, text_only=["a"])


def test_an_interrupted_folder_goes_on(tmp_path):
    asked = {"prompts": ["a"], "num_samples": 5, "batch_size": 2}
    write(tmp_path / "whole", **asked)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "part", progress=Interrupting(2), **asked)
    assert 2 <= len(list((tmp_path / "part").glob("0*.json"))) < 5
    write(tmp_path / "part", **asked)
    assert content(tmp_path / "part") == content(tmp_path / "whole")


# --- streaming -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["pages", "words"])
def test_the_sink_hears_the_text_while_it_is_written(tmp_path, model):
    heard: list[str] = []
    asked = {"text_only": ["text 3 says"], "temperature": 1.0, "max_tokens": 60, "model": model}
    write(tmp_path, sink=heard.append, **asked)
    (row,) = rows_of(tmp_path)
    assert len(heard) > 5
    assert "".join(heard) == row["text"].rstrip("\ufffd") + "\n"


def test_of_several_pages_nothing_is_heard(tmp_path):
    heard: list[str] = []
    write(tmp_path, sink=heard.append, text_only=["a", "b"], **HOT)
    assert not heard


def favouring(writing: Writing, mark: int, by: float) -> None:
    """Let the model like a mark, from its fifth word on."""
    plain, calls = writing.model.logits, iter(range(10_000))

    def logits(states: torch.Tensor) -> torch.Tensor:
        scores = plain(states).clone()
        scores[..., mark] += by if next(calls) % 5 == 4 else -by
        return scores

    writing.model.logits = logits  # type: ignore[method-assign]


@pytest.mark.parametrize("model", MODELS)
def test_the_model_says_when_it_draws_and_a_page_is_never_too_long(
    multimodal_home, shapes, tmp_path, model
):
    loaded = load_generator(multimodal_home / "runs" / model / "export", torch.device("cpu"))
    writing = Writing.of(loaded, None, torch.device("cpu"), SILENT)
    favouring(writing, writing.text.marks.bod, 1000.0)
    (tmp_path / "00.png").write_bytes((shapes / "00.png").read_bytes())
    page = page_in(tmp_path)
    engine = writing.engine(SamplerConfig(num_inference_steps=2), TextSamplerConfig())
    task = interleaved_task(page, 1000)
    (made,) = writing.write(engine, [task], [0], 0)
    images = [piece for piece in made.pieces if isinstance(piece, torch.Tensor)]
    words = [piece for piece in made.pieces if isinstance(piece, tuple)]
    blank = torch.zeros(NUM_LATENTS, writing.model.config.latent_channels)
    room = ROW_LENGTH - len(writing._document(task, [blank] * len(task.images)))
    added = sum(map(len, words)) + len(images) * (NUM_LATENTS + 2)
    assert 1 < len(images) <= 8
    assert room - NUM_LATENTS - 2 < added <= room
    assert made.ended_by == "bound"
    assert isinstance(made.pieces[0], tuple)
    assert isinstance(made.pieces[1], torch.Tensor)


# --- a model of text alone -------------------------------------------------------------------


def test_a_model_of_text_alone_writes_and_has_no_images(shapes, tmp_path):
    asked = {"model": "words", "temperature": 0.7, "max_tokens": 30}
    made = write(tmp_path / "s", text_only=["text 3"], **asked)
    assert made.figures["text"] == rows_of(tmp_path / "s")[0]["text"]
    assert not list((tmp_path / "s").glob("*.png"))
    for settings in ({"captions_of": [shapes / "00.png"]}, {"prompts": ["a"]}):
        with pytest.raises(ArtifactError, match="model of text alone, so it has no images"):
            write(tmp_path / "t", **settings, model="words")


# --- the command -----------------------------------------------------------------------------


def test_the_command_draws_describes_answers_and_goes_on(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    image = str(shapes / "00.png")
    for number, line in enumerate(
        (
            ["--prompt", "a red circle", "-n", "2"],
            ["--caption", image, "--max-tokens", "5"],
            ["--ask", "which shape?", "--image", image, "--temperature", "0.5", "--top-p", "0.9"],
            ["--text-only", "text 1", "--max-tokens", "5"],
            ["--data", str(shapes.parent), "--split", "train", "-n", "2"],
        )
    ):
        where = ["--model", "pages", "--device", "cpu", "--json", "--out", f"s{number}"]
        done = runner.invoke(app, ["sample", *line, *where], "", None, False)
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["figures"]["samples"] == len(rows_of(tmp_path / f"s{number}"))
    told = runner.invoke(
        app,
        ["sample", "--text-only", "text 1", "--model", "pages", "--device", "cpu", "--out", "t"],
    )
    (row,) = rows_of(tmp_path / "t")
    assert row["text"] in told.stderr
    assert row["text"] in told.stdout
