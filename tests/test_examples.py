"""The examples that run in minutes on a CPU are run as a user would run them."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_image_example_walks_the_whole_path(tmp_path):
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", EXAMPLES / "image.sh", tmp_path],
        env={**os.environ, "PATH": commands},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/lm-embedded-shapes-dit-tiny/export/model.safetensors").is_file()
    assert len(list((tmp_path / "samples").glob("*/grid.png"))) == 2
