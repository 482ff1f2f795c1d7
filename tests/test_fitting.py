"""Batches that do not fit into memory: a warning that says what does, and nothing is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentlm_core import workflows
from latentlm_core.errors import LatentLMError
from latentlm_core.models.dit import DiT, DiTSize
from latentlm_core.progress import SilentProgress
from latentlm_core.sampling import InterleavedEngine, LatentLMEngine, SpanEngine
from latentlm_core.workflows import memory
from latentlm_core.workflows.memory import Fitting, cache_bytes, free_bytes, lacks_memory
from latentlm_core.workflows.spoken_folder import SpokenFolder
from tests import tiny_evaluation, tiny_multimodal, tiny_speaking
from tests.test_models import tiny_latent_lm

CPU = torch.device("cpu")
TEXTS = ["three one four", "nine", "six", "a", "two seven", "one"]


class Ear(SilentProgress):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_evaluation.make_home(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_speaking.make_home(tmp_path_factory.mktemp("speech"))


def limit(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, most: int) -> list[int]:
    """Let an engine run out of memory with more than ``most`` requests; sizes that it was given."""
    method, sizes = getattr(kind, name), []

    def run(self: Any, requests: Any, *args: Any) -> Any:
        sizes.append(len(requests))
        if len(requests) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return method(self, requests, *args)

    monkeypatch.setattr(kind, name, run)
    return sizes


# --- while samples are drawn -----------------------------------------------------------------


def test_images_are_drawn_in_halves(pictures, tmp_path, monkeypatch, ear):
    monkeypatch.setenv("LATENTLM_HOME", str(pictures))
    asked = {"num_samples": 10, "batch_size": 8, "device": "cpu"}
    workflows.sample(out=tmp_path / "whole", **asked)
    sizes = limit(monkeypatch, LatentLMEngine, "generate", 3)
    workflows.sample(out=tmp_path / "parts", progress=ear, **asked)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert [warning.partition(" at a time")[0][-22:] for warning in ear.warnings] == [
        "so samples are drawn 4",
        "so samples are drawn 2",
    ]
    assert "A batch of 8 does not fit into the memory of" in ear.warnings[0]
    assert ear.warnings[1].endswith("as with --batch-size 2.")
    names = [path.name for path in sorted((tmp_path / "parts").glob("0*.png"))]
    assert names == [path.name for path in sorted((tmp_path / "whole").glob("0*.png"))]


def test_pages_are_written_in_halves(multimodal_home, tmp_path, monkeypatch, ear):
    monkeypatch.setenv("LATENTLM_HOME", str(multimodal_home))
    sizes = limit(monkeypatch, InterleavedEngine, "write", 2)
    tiny_multimodal.write(tmp_path, prompts=["a red"], num_samples=4, progress=ear)
    assert sizes == [4, 2, 2]
    assert [row["index"] for row in tiny_multimodal.rows_of(tmp_path)] == [0, 1, 2, 3]


def test_lines_that_were_said_before_memory_ran_out_are_not_said_again(
    speech, tmp_path, monkeypatch, ear
):
    monkeypatch.setenv("LATENTLM_HOME", str(speech))
    given: list[tuple[int | None, int]] = []
    draw = SpanEngine.draw

    def run_out(self: SpanEngine, requests: Any, listener: Any, on_end: Any) -> Any:
        given.append((self.batch_size, len(requests)))
        said: list[int] = []

        def end(index: int, span: Any) -> None:
            on_end(index, span)
            said.append(index)
            if len(given) == 1 and len(said) == 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        return draw(self, requests, listener, end)

    monkeypatch.setattr(SpanEngine, "draw", run_out)
    tiny_speaking.speak(tmp_path, texts=TEXTS, batch_size=4, progress=ear)
    assert given == [(4, 6), (2, 4)]
    assert [row["text"] for row in tiny_speaking.rows_of(tmp_path)] == TEXTS
    assert len(ear.warnings) == 1


def test_one_that_does_not_fit_is_an_error(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(pictures))
    limit(monkeypatch, LatentLMEngine, "generate", 0)
    with pytest.raises(LatentLMError, match="Not even a single sample fits into the memory of"):
        workflows.sample(num_samples=2, out=tmp_path, device="cpu")


def test_other_faults_are_faults(ear):
    fitting = Fitting(lambda size: size, 4, 0, CPU, ear)
    with pytest.raises(RuntimeError, match="shape"):
        fitting.run(lambda engine, size: torch.zeros(2).view(3))
    assert fitting.run(lambda engine, size: (engine, size)) == (4, 4)
    assert ear.warnings == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("The size of tensor a (2) must match"), False),
    ],
)
def test_what_running_out_looks_like(error, expected):
    assert lacks_memory(error) is expected


def test_the_allocator_of_the_host_runs_out_like_that():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert lacks_memory(caught.value)


# --- before anything is drawn ----------------------------------------------------------------


def test_what_certainly_does_not_fit_is_not_begun(monkeypatch, ear):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    made: list[int] = []
    assert Fitting(lambda size: made.append(size), 16, 100, CPU, ear).size == 8
    assert made == [8]
    assert len(ear.warnings) == 1
    assert Fitting(made.append, 16, 10_000, CPU, ear).size == 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert Fitting(made.append, 16, 10_000, CPU, ear).size == 16


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_the_cache_is_counted_as_it_is(num_kv_heads):
    model = tiny_latent_lm(num_kv_heads).to(torch.bfloat16)
    cache = model.backbone.new_cache(3, 17)
    assert 3 * cache_bytes(model, 17) == sum(part.nbytes for part in cache._store)
    size = DiTSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
    assert cache_bytes(DiT(size.complete((4, 4), 8, 11)), 16) == 0


def test_free_memory_is_read_where_the_system_tells(monkeypatch, tmp_path):
    info = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMORY_INFO", info)
    assert free_bytes(CPU) is None
    info.write_text(
        "MemTotal:       16000 kB\nMemAvailable:    9000 kB\nHugePages_Total:       0\n"
    )
    assert free_bytes(CPU) == 9000 * 1024


# --- a queue of lines ------------------------------------------------------------------------


def test_a_kill_loses_what_is_under_way_alone(speech, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(speech))
    add, left = SpokenFolder.add, [3]

    def add_some(self: SpokenFolder, *sample: Any) -> None:
        add(self, *sample)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SpokenFolder, "add", add_some)
        with pytest.raises(KeyboardInterrupt):
            tiny_speaking.speak(tmp_path, texts=TEXTS, batch_size=2)
    whole = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.wav")}
    assert len(whole) == 3
    sizes = limit(monkeypatch, SpanEngine, "draw", 6)
    tiny_speaking.speak(tmp_path, texts=TEXTS, batch_size=2)
    assert sizes == [3]
    assert [row["text"] for row in tiny_speaking.rows_of(tmp_path)] == TEXTS
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in whole} == whole


def test_an_engine_is_given_several_batches_at_once(speech, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLM_HOME", str(speech))
    sizes = limit(monkeypatch, SpanEngine, "draw", 8)
    tiny_speaking.speak(tmp_path, texts=["nine"], num_samples=10, batch_size=2)
    assert sizes == [8, 2]
