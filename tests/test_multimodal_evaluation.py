"""eval ppl, caption, vqa and t2i: figures that can be known, reports, and what cannot be judged."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core import workflows
from latentlm_core.artifacts import load_generator
from latentlm_core.data.coloured_digits import DIGIT_NAMES
from latentlm_core.data.documents import pad
from latentlm_core.data.sources import open_source
from latentlm_core.data.texts import open_texts
from latentlm_core.errors import ArtifactError, CorruptFileError, DataError
from latentlm_core.evaluation.classifier import ClassifierConfig, ImageClassifier
from latentlm_core.evaluation.digit_checker import Reading
from latentlm_core.progress import SILENT
from latentlm_core.sampling import Continuation
from latentlm_core.workflows import evaluate_drawing
from latentlm_core.workflows.writing import Question, Writing
from tests.tiny_multimodal import ROW_LENGTH, write
from tests.tiny_training import Listener

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _workspace(multimodal_home, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(multimodal_home))


@pytest.fixture
def shapes(multimodal_home) -> str:
    return str(multimodal_home / "shapes")


def writing_of(home: Path, name: str) -> Writing:
    return Writing.of(load_generator(home / "runs" / name / "export", CPU), None, CPU, SILENT)


# --- perplexity ------------------------------------------------------------------------------


def ppl(folder: Path, name: str = "report", **settings):
    settings = {"model": "pages", "device": "cpu", **settings}
    return workflows.evaluate_perplexity(out=folder / f"{name}.json", **settings)


@pytest.mark.parametrize("model", ["pages", "transfusion", "words"])
def test_perplexity_is_that_of_full_forwards(multimodal_home, tmp_path, model):
    """Token by token, each from a forward of what stands before it in its stretch."""
    texts = {"short.txt": "text 2 says caf\u00e9. ", "long.txt": "text 11 says this. " * 12}
    for name, text in texts.items():
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_text(text)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    writing = writing_of(multimodal_home, model)
    nats = tokens = 0.0
    for text in texts.values():
        ids = writing.format.text_ids(text)
        for place in range(1, len(ids)):
            start = (place - 1) // (ROW_LENGTH - 1) * (ROW_LENGTH - 1)
            batch = writing.format.stretch(ids[start : place + 1], "")
            nats += cost_of_last(writing, batch)
            tokens += 1
    found = ppl(tmp_path, model=model, data=f"text:{tmp_path}").figures
    assert (found["num_documents"], found["num_tokens"]) == (2, tokens)
    assert found["num_bytes"] == sum(len(text.encode()) for text in texts.values())
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / found["num_bytes"], rel=1e-4
    )


@torch.no_grad()
def cost_of_last(writing: Writing, document) -> float:
    """Nats of the last token of a document."""
    batch = pad([document])
    states = writing.model.states(batch.ids[:, :-1], batch.latents[:, :-1], batch.layout)
    return -float(writing.model.logits(states[0, -1]).log_softmax(-1)[batch.ids[0, -1]])


def test_every_token_of_a_long_text_is_predicted_once(multimodal_home):
    pages = writing_of(multimodal_home, "pages").format
    for item in open_texts(str(multimodal_home / "texts"), "train"):
        ids = pages.text_ids(item.text)
        for length in (2, 3, 50, len(ids) - 1, len(ids), len(ids) + 1):
            made = pages.stretches(item.text, item.key, length)
            stretches = [stretch.ids.tolist() for stretch in made]
            assert max(map(len, stretches)) <= length
            assert [token for stretch in stretches for token in stretch[1:]] == ids[1:]
            assert all(a[-1] == b[0] for a, b in pairwise(stretches))


def test_perplexity_does_not_depend_on_the_batch_and_takes_some(multimodal_home, tmp_path):
    data = {"data": str(multimodal_home / "texts"), "split": "train"}
    one, many = (ppl(tmp_path, batch_size=size, **data).figures for size in (1, 64))
    assert one == pytest.approx(many, rel=1e-5)
    assert one["num_documents"] == 19
    assert ppl(tmp_path, num_samples=3, **data).figures["num_documents"] == 3


def test_perplexity_of_texts_without_parts_says_what_it_read(multimodal_home, tmp_path):
    data, listener = str(multimodal_home / "texts"), Listener()
    part, whole = (
        ppl(tmp_path, data=data, split=split, progress=listener).details
        for split in ("test", "all")
    )
    assert part["split"] == "what training holds out of it"
    assert (part["values"]["num_documents"], whole["values"]["num_documents"]) == (1, 20)
    (told,) = [note for note in listener.notes if "split" in note]
    assert told.endswith(
        "texts has no test split: this is what training holds out of it; "
        "--split all reads it whole."
    )


def test_the_report_of_perplexity_tells_how(multimodal_home, tmp_path):
    found = ppl(tmp_path, data=str(multimodal_home / "texts"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metric"] == "perplexity"
    assert (report["context"], report["stride"]) == (ROW_LENGTH, ROW_LENGTH - 1)
    assert report["values"] == found.figures
    assert report["model_sha256"] == writing_of(multimodal_home, "pages").loaded.sha256
    assert report["text_tokenizer"] == writing_of(multimodal_home, "pages").text.sha256


def test_reports_of_other_parts_stand_beside_each_other(multimodal_home):
    asked = {"data": f"text:{multimodal_home / 'texts'}", "model": "pages", "device": "cpu"}
    made = [
        workflows.evaluate_perplexity(**asked, **part).files["report"]
        for part in ({"num_samples": 1}, {"num_samples": 2, "split": "train"})
    ]
    assert [Path(path).name for path in made] == ["ppl-texts-1.json", "ppl-texts-train-2.json"]
    report = json.loads(Path(made[1]).read_text())
    assert (report["data"], report["num_samples"]) == (str(multimodal_home / "texts"), 2)


def test_texts_that_are_not_there(multimodal_home, tmp_path):
    with pytest.raises(DataError, match="There is no set of texts 'nothing'"):
        ppl(tmp_path, data="nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        ppl(tmp_path, data=str(tmp_path / "empty"))


# --- captions and questions ------------------------------------------------------------------


def answering(monkeypatch, data: str, right: float = 1.0) -> None:
    """Let every model say what people said, of the first ``right`` of the images, else nothing."""
    said: dict[tuple[str, str | None], str] = {}
    source = open_source(data, "test")
    for index in range(len(source)):
        example = source[index]
        known = index < right * len(source)
        said[example.key, None] = str(example.caption) if known else "?"
        said |= {(example.key, q): f" {a}. " if known else "?" for q, a in example.questions}

    def answer(self, engine, tasks, indices, seed, listener=None):
        pages = []
        for task in tasks:
            asked = [piece.text for piece in task.pieces if isinstance(piece, Question)]
            text = said[task.name, asked[0] if asked else None]
            pages.append(Continuation((tuple(self.text.encode(text)),), "end"))
        return pages

    monkeypatch.setattr(Writing, "write", answer)


def judge(metric: str, folder: Path, **settings):
    settings = {"model": "pages", "device": "cpu", **settings}
    of = {"caption": workflows.evaluate_captions, "vqa": workflows.evaluate_vqa}[metric]
    return of(out=folder / f"{metric}.json", **settings)


def test_a_model_that_says_what_people_said_is_right(shapes, tmp_path, monkeypatch):
    answering(monkeypatch, shapes)
    assert judge("vqa", tmp_path, data=shapes).figures == {"match_accuracy": 1.0, "questions": 10}
    figures = judge("caption", tmp_path, data=shapes).figures
    assert figures["exact_match"] == 1.0
    assert figures["cider"] > 5


def test_a_model_that_is_right_of_some_images(shapes, tmp_path, monkeypatch):
    answering(monkeypatch, shapes, right=0.5)
    found = judge("vqa", tmp_path, data=shapes)
    assert found.figures["match_accuracy"] == pytest.approx(3 / 5)
    assert found.details["by_question"] == {"which shape?": 0.6, "which colour?": 0.6}
    assert judge("caption", tmp_path, data=shapes).figures["exact_match"] == pytest.approx(3 / 5)
    rows = [json.loads(line) for line in (tmp_path / "vqa.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert rows[0] | {"said": 0} == {
        "key": "00.png",
        "question": "which shape?",
        "said": 0,
        "references": ["circle"],
        "normalised": "circle",
        "score": 1.0,
    }
    assert [row["score"] for row in rows] == [1.0] * 6 + [0.0] * 4


@pytest.mark.parametrize("model", ["pages", "transfusion"])
@pytest.mark.parametrize("metric", ["caption", "vqa"])
def test_what_is_said_does_not_depend_on_the_batch(shapes, tmp_path, metric, model):
    rows = []
    for size in (1, 64):
        judge(metric, tmp_path, data=shapes, batch_size=size, model=model)
        rows.append((tmp_path / f"{metric}.jsonl").read_text())
    assert rows[0] == rows[1]
    report = json.loads((tmp_path / f"{metric}.json").read_text())
    assert (report["metric"], report["decoding"], report["split"]) == (metric, "greedy", "test")


def test_only_so_many_images_from_all_over_the_set(shapes, tmp_path):
    judge("caption", tmp_path, data=shapes, split="train", num_samples=3)
    rows = [json.loads(line) for line in (tmp_path / "caption.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["00.png", "10.png", "20.png"]


def test_sets_without_words_and_models_without_images(shapes, tmp_path):
    with pytest.raises(DataError, match="embedded:shapes has no questions in its split 'test'"):
        judge("vqa", tmp_path, data="embedded:shapes")
    write(tmp_path / "s", prompts=["a"])
    with pytest.raises(DataError, match="has no captions in its split 'train'"):
        judge("caption", tmp_path, data=str(tmp_path / "s"), split="train")
    with pytest.raises(ArtifactError, match="model of text alone, so it has no images"):
        judge("caption", tmp_path, data=shapes, model="words")


# --- text to image ---------------------------------------------------------------------------


def t2i(samples: Path, **settings):
    settings = {"extractor": "none", "clip": "none", "device": "cpu", **settings}
    return workflows.evaluate_text_to_image(samples=str(samples), **settings)


def test_images_of_prompts_without_a_judge(shapes, tmp_path):
    write(tmp_path / "s", data=shapes, split="train", num_samples=4)
    found = t2i(tmp_path / "s")
    assert found.figures == {"images": 4}
    report = json.loads((tmp_path / "s/evaluation/t2i.json").read_text())
    assert report["samples_settings"]["prompts"] == shapes
    assert "checker" not in report


def test_distances_are_to_the_data_of_the_training(multimodal_home, shapes, tmp_path):
    config = ClassifierConfig(data=shapes, classes=tuple("ab"), image_size=16, width=4)
    ImageClassifier(config).save(tmp_path / "judge")
    write(tmp_path / "s", data=shapes, split="train", num_samples=24)
    network = {"extractor": str(tmp_path / "judge")}
    (fid,) = t2i(tmp_path / "s", **network).figures.keys() - {"images"}
    theirs = t2i(tmp_path / "s", **network).figures[fid]
    own = t2i(tmp_path / "s", reference=str(tmp_path / "s"), **network).figures[fid]
    assert fid.startswith("fid[classifier-")
    assert theirs > 0
    assert abs(own) < 0.01 * theirs


class Checker:
    """Finds the digits right of every image, the colours of the first half."""

    class classifier:  # noqa: N801
        class config:  # noqa: N801
            test_accuracy = 0.99

    def read(self, images, scenes):
        half = len(scenes) // 2
        return [Reading(True, place < half, True, scene) for place, scene in enumerate(scenes)]


def test_coloured_digits_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_drawing, "digit_checker", lambda device, progress: Checker())
    prompts = [f"a red {name} on a blue background" for name in DIGIT_NAMES[:4]]
    write(tmp_path / "s", prompts=prompts)
    found = t2i(tmp_path / "s")
    shares = {"digits_right": 1.0, "colours_right": 0.5, "positions_right": 1.0, "agreement": 0.5}
    assert found.figures == {"images": 4, **shares}
    lines = (tmp_path / "s/evaluation/t2i-checked.jsonl").read_text().splitlines()
    assert [json.loads(line)["agreement"] for line in lines] == [True, True, False, False]
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    assert found.details["checker"]["digit_accuracy"] == 0.99


def test_other_prompts_are_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_drawing, "digit_checker", None)
    write(tmp_path / "s", prompts=["a red seven on a blue background", "a red circle"])
    assert t2i(tmp_path / "s").figures == {"images": 2}


def test_a_clip_that_cannot_be_had_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ArtifactError("There are no weights.")

    monkeypatch.setattr(evaluate_drawing, "load_clip", refuse)
    write(tmp_path / "s", prompts=["a"])
    listener = Listener()
    found = t2i(tmp_path / "s", clip="openai/clip", progress=listener)
    assert found.figures["clip_score"] is None
    assert "The CLIP score is left out. There are no weights." in listener.notes


def test_samples_that_are_not_images_of_prompts(multimodal_home, tmp_path):
    image = multimodal_home / "shapes/test/00.png"
    write(tmp_path / "said", captions_of=[image], max_tokens=3)
    with pytest.raises(DataError, match="has no images"):
        t2i(tmp_path / "said")
    write(tmp_path / "drawn", prompts=["a"])
    shutil.copy(tmp_path / "drawn/000000.png", tmp_path / "drawn/000000-1.png")
    with pytest.raises(DataError, match="has 2 images of 1 prompts, not one each"):
        t2i(tmp_path / "drawn")
    rows = (tmp_path / "drawn/samples.jsonl").read_text()
    for text in (rows.replace('"prompt"', '"class_name"'), rows.replace('"a"', "3")):
        (tmp_path / "drawn/samples.jsonl").write_text(text)
        with pytest.raises(CorruptFileError, match=r"samples\.jsonl names no prompts"):
            t2i(tmp_path / "drawn")


# --- the commands ----------------------------------------------------------------------------


def test_the_commands_report(multimodal_home, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s", prompts=["a red circle"])
    for line in (
        ["ppl", "--data", str(multimodal_home / "texts"), "--model", "pages", "-n", "1"],
        ["caption", "--data", shapes, "--model", "pages", "-n", "2"],
        ["vqa", "--data", shapes, "--model", "pages", "-n", "2"],
        ["t2i", "--samples", "s", "--extractor", "none", "--clip", "none"],
    ):
        where = ["--device", "cpu", "--json", "--out", "report.json"]
        done = CliRunner().invoke(app, ["eval", *line, *where], "", None, False)
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["values"] == result["figures"]
