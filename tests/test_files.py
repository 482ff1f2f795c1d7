"""Files and folders that are whole or not there."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentlm_core.errors import ArtifactError
from latentlm_core.files import read_safetensors, write_folder, write_safetensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def write(folder: Path, text: str) -> None:
    with write_folder(folder) as part:
        (part / "text").write_text(text)


def test_a_folder_takes_the_place_of_the_one_that_was_there(tmp_path):
    write(tmp_path / "set", "old")
    write(tmp_path / "set", "new")
    assert (tmp_path / "set" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_that_cannot_be_replaced_is_as_before(tmp_path, monkeypatch):
    write(tmp_path / "set", "old")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name.endswith(".part"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ArtifactError, match="set cannot be written: Permission denied"):
        write(tmp_path / "set", "new")
    assert (tmp_path / "set" / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def test_a_block_that_fails_leaves_the_folder_as_before(tmp_path):
    write(tmp_path / "set", "old")
    with pytest.raises(ZeroDivisionError), write_folder(tmp_path / "set") as part:
        (part / "text").write_text(str(1 // 0))
    assert (tmp_path / "set" / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def tensors_of(dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, dtype in enumerate(dtypes):
        values = torch.arange(24).remainder(5).to(dtype)
        tensors |= {
            f"{number}.matrix": values.view(4, 6),
            f"{number}.transposed": values.view(4, 6).t(),
            f"{number}.scalar": values[3],
            f"{number}.empty": values.new_empty(0, 3),
        }
    return tensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES[::-1], []])
def test_tensors_are_written_as_the_library_writes_them(tmp_path, dtypes, metadata):
    tensors = tensors_of(dtypes) | {'an "odd"\nname/é\x01\x7f': torch.ones(3)}
    write_safetensors(tmp_path / "ours", tensors, metadata)
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert os.listdir(tmp_path) in (["ours", "theirs"], ["theirs", "ours"])


def test_nothing_but_names_values_and_metadata_decides_the_bytes(tmp_path):
    tensors = tensors_of(DTYPES)
    write_safetensors(tmp_path / "one", tensors, {"b": "1", "a": "2"})
    turned = dict(reversed(tensors.items()))
    write_safetensors(tmp_path / "two", turned, {"a": "2", "b": "1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = read_safetensors(tmp_path / "one")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    write_safetensors(tmp_path / "none", {})
    assert read_safetensors(tmp_path / "none") == {}


def test_weights_and_their_gradients_are_no_obstacle(tmp_path):
    weight = torch.nn.Linear(2, 3).weight
    write_safetensors(tmp_path / "file", {"weight": weight, "tied": weight})
    read = read_safetensors(tmp_path / "file")
    assert torch.equal(read["weight"], weight)
    assert torch.equal(read["tied"], weight)


def test_a_disk_that_is_full_in_the_middle_of_a_tensor_leaves_what_was_there(tmp_path):
    write_safetensors(tmp_path / "file", {"weight": torch.ones(4)})
    before = (tmp_path / "file").read_bytes()
    with limited(40_000), pytest.raises(ArtifactError, match="file cannot be written: File too"):
        write_safetensors(tmp_path / "file", {"weight": torch.zeros(100_000)})
    assert (tmp_path / "file").read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """No file may become longer, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits are those of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


PEAK = """
import resource, sys, torch
from pathlib import Path
from latentlm_core.files import write_safetensors
tensors = {str(i): torch.ones(1_000_000).view(2, -1).t() for i in range(20)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(Path(sys.argv[1]), tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_no_second_copy_of_the_tensors_lies_in_memory(tmp_path):
    command = [sys.executable, "-c", PEAK, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000, (
        "KB beyond the 160,000 of the tensors; a copy of one has 8,000"
    )
