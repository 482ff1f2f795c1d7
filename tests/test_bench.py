"""latentlm bench: every command measures, ratios are true, and impossible asks end early."""

import importlib
import json
import os

import pytest
import torch
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core.artifacts import save_tokenizer
from latentlm_core.data.caching import ImageEncoder, LatentViews, encode_source
from latentlm_core.data.embedded import ShapesSource
from latentlm_core.data.sources import Subset, open_source
from latentlm_core.errors import ConfigError, CorruptFileError, DataError, LatentLMError
from latentlm_core.export_config import TokenizerExport
from latentlm_core.progress import SILENT
from latentlm_core.recipes import vae_recipe
from latentlm_core.runtime import evaluating
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.workflows import bench, bench_load, bench_sample, bench_tokenize, bench_train
from latentlm_core.workflows.bench import (
    Ceilings,
    Conditions,
    Memory,
    Timing,
    each_batch,
    take_turns,
)
from tests.test_decoding import Ear

CPU = torch.device("cpu")
FEW = {"repeats": 2, "warm_up": 0, "device": "cpu"}
RATES = {"median", "min", "max"}
SAMPLING = importlib.import_module("latentlm_core.workflows.bench_sample")
TOKENIZING = importlib.import_module("latentlm_core.workflows.bench_tokenize")
"""The modules, whose names in the package are their functions'."""
runner = CliRunner(env={"RANK": None})


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A set of all shapes, made by a tokenizer with an export as runs have it."""
    folder, config = tmp_path_factory.mktemp("latents"), vae_recipe("tiny").tokenizer
    vae = build_tokenizer(config)
    save_tokenizer(folder / "vae", vae, TokenizerExport(tokenizer=config))
    encode_source(
        open_source("embedded:shapes"),
        vae,
        folder / "set",
        spec="embedded:shapes",
        split="train",
        tokenizer_export=folder / "vae",
    )
    return folder / "set"


def run(line: str) -> dict:
    done = runner.invoke(app, f"bench {line} --repeats 2 --warm-up 0 --device cpu --json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def check_details(found: dict) -> list[dict]:
    details = found["details"]
    assert details["machine"]
    assert details["versions"]["torch"] == torch.__version__.split("+")[0]
    assert details["options"]["repeats"] == 2
    assert set(details["load"]) == {"start", "end"}
    assert details["busy"] == (details["load"]["start"] > bench.BUSY * os.cpu_count())
    return details["rows"]


# --- the commands ----------------------------------------------------------------------------


def test_train_on_drawn_latents():
    found = run("train --recipe tiny --batch 4,2 --steps 2")
    rows = check_details(found)
    assert [row["batch"] for row in rows] == [2, 4]
    for row in rows:
        assert row["tokens_per_second"]["median"] == pytest.approx(
            16 * row["images_per_second"]["median"], rel=0.01
        )
        assert 0 < row["flops_utilisation"] < 2
        assert 0 <= row["data_wait_share"] < 1
        assert "ratio" not in row
    assert found["details"]["peak_teraflops"] > 0


def test_train_against_encoding_at_every_step(latents):
    line = f"train --recipe tiny --data {latents} --encode --batch 4 --steps 2"
    (row,) = check_details(run(line))
    ratio = row["images_per_second"]["median"] / row["encoding_images_per_second"]["median"]
    assert row["ratio"] == pytest.approx(ratio, rel=0.01)


def test_a_dit_is_trained_too(latents):
    (row,) = run(f"train --recipe dit-tiny --data {latents} --batch 4 --steps 1")["details"]["rows"]
    assert row["steps_per_second"]["median"] > 0


def test_tokenize_against_a_loop_that_does_one_after_another():
    (row,) = check_details(run("tokenize --recipe tiny --batch-size 8 --steps 3"))
    for name in ("pipeline", "plain", "read", "encode", "write", "decode"):
        assert set(row[f"{name}_images_per_second"]) == RATES
    rates = {name: row[f"{name}_images_per_second"]["median"] for name in ("pipeline", "plain")}
    assert row["ratio"] == pytest.approx(rates["pipeline"] / rates["plain"], rel=0.01)
    slowest = min(row[f"{name}_images_per_second"]["median"] for name in TOKENIZING.STAGES)
    assert row[f"{row['slowest']}_images_per_second"]["median"] == slowest
    assert row["share_of_slowest"] == pytest.approx(rates["pipeline"] / slowest, rel=0.01)
    assert 0 < row["data_wait_share"] + row["write_wait_share"] < 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_ways_to_tokenize_write_the_same_bytes(tmp_path, num_workers):
    source = Subset(open_source("embedded:shapes"), [place % 5 for place in range(12)])
    tokenizer = build_tokenizer(vae_recipe("tiny").tokenizer)
    encoder = ImageEncoder(source, tokenizer, LatentViews(32), CPU, num_workers)
    ways = TOKENIZING.Ways(encoder, tmp_path, 4, 3)
    written = []
    for way in (ways.overlapping, ways.one_by_one, ways.overlapping):
        with evaluating(tokenizer):
            way()
        shards = sorted(tmp_path.glob("*.safetensors"))
        written.append([shard.read_bytes() for shard in shards])
        for shard in shards:
            shard.unlink()
    assert [len(shards) for shards in written] == [2, 2, 2]
    assert written[0] == written[1] == written[2]


def test_tokenizing_of_nothing_is_refused(monkeypatch):
    def broken(*_):
        raise CorruptFileError("it is empty.")

    monkeypatch.setattr(ShapesSource, "__getitem__", broken)
    with pytest.raises(DataError, match="None of the first 24 images of embedded:shapes"):
        bench_tokenize(recipe="tiny", batch_size=8, steps=3, **FEW)


def test_load_reads_a_set_and_tells_who_waits(latents):
    found = run(f"load --data {latents} --recipe tiny --batch-size 8 --steps 3")
    (row,) = check_details(found)
    per_example = row["megabytes_per_second"]["median"] / row["examples_per_second"]["median"]
    stored = sum(path.stat().st_size for path in latents.glob("*.safetensors"))
    assert per_example == pytest.approx(stored / found["figures"]["examples"] / 1e6, rel=0.01)
    assert 0 < row["data_wait_share"] < 1


# --- what they are made of -------------------------------------------------------------------


def test_ceilings_are_measured():
    ceilings = Ceilings.measure(CPU, torch.float32)
    assert 1e8 < ceilings.flops < 1e14
    assert 1e8 < ceilings.bytes < 1e13


def test_works_take_turns_and_warm_up_does_not_count():
    heard = []
    timings = take_turns([lambda: heard.append("a"), lambda: heard.append("b")], 3, 2, CPU)
    assert heard == ["a", "b"] * 5
    assert [len(timing.seconds) for timing in timings] == [3, 3]


def test_memory_is_measured_anew_each_time(monkeypatch, tmp_path):
    memory = Memory(CPU)
    if memory.peak_megabytes is None:
        pytest.skip("this system does not tell how much memory a process took")
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert memory.peak_megabytes >= 45
    memory.restart()
    assert memory.peak_megabytes < 25
    del held
    monkeypatch.setattr(bench, "PROCESS", tmp_path / "none")
    assert Memory(CPU).peak_megabytes is None


def test_rates_have_a_spread():
    assert Timing((0.5, 1.0, 2.0)).rates(4) == {"median": 4.0, "min": 2.0, "max": 8.0}


def test_an_idle_machine_is_not_called_busy(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    ear = Ear()
    found = Conditions(CPU, {}, ear).result("Speed", {}, [])
    assert ear.warnings == []
    assert (found.details["busy"], found.figures["machine"]) == (False, found.details["machine"])


# --- what bad input gets ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "limit", "fits", "told"),
    [((64, 4, 2), 5, [2, 4], 4), ((64, 2), 16, [2, 16], 16), ((64,), 9, [8], 8)],
)
def test_in_place_of_a_batch_that_does_not_fit_one_that_does_is_measured(asked, limit, fits, told):
    def measure(batch: int) -> int:
        if batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return -batch

    ear = Ear()
    assert each_batch(asked, CPU, measure, ear) == {batch: -batch for batch in fits}
    (warning,) = ear.warnings
    assert "A batch of 64 does not fit into the memory of" in warning
    assert warning.endswith(f"; {told} does.")


def test_a_host_without_the_memory_is_told_alike_and_other_faults_are_faults():
    with pytest.raises(LatentLMError, match=r"batch of 2 does not fit.*neither does any smaller"):
        each_batch((2,), CPU, lambda batch: torch.empty(1 << 60, dtype=torch.uint8), SILENT)
    with pytest.raises(RuntimeError, match="size"):
        each_batch((1,), CPU, lambda batch: torch.zeros(2) + torch.zeros(3), SILENT)


def test_batches_are_measured_once_each_from_the_smallest_on():
    measured = each_batch((4, 1, 4), CPU, lambda batch: -batch, SILENT)
    assert list(measured.items()) == [(1, -1), (4, -4)]


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: bench_sample(size="tiny", mode="graph", **FEW), "captures a CUDA graph"),
        (lambda: bench_sample(size="dit-tiny", mode="compile", **FEW), "no --mode compile"),
        (lambda: bench_sample(size="tiny", model="x", **FEW), "leave --size"),
        (lambda: bench_sample(num_latents=16, **FEW), "go with --size"),
        (lambda: bench_sample(size="tiny", num_latents=5, **FEW), "square grid"),
        (lambda: bench_sample(size="transfusion-coloured-digits", **FEW), "images of classes"),
        (lambda: bench_sample(size="tiny", against="digit-strings", **FEW), "images of classes"),
        (lambda: bench_sample(against="tiny", **FEW), "go with --size"),
        (lambda: bench_sample(size="tiny", num_inference_steps=2000, **FEW), "or equal to 1000"),
        (lambda: bench_sample(size="tiny", guidance_scale=-1.0, **FEW), "or equal to 0"),
        (lambda: bench_sample(size="tiny", batches=(), **FEW), "--batch is"),
        (lambda: bench_sample(size="tiny", batches=(0,), **FEW), "--batch is"),
        (lambda: bench_train(recipe="tiny", encode=True, **FEW), "name it by --data"),
        (lambda: bench_train(recipe="tiny", data="x", num_latents=4, **FEW), "leave --latents"),
        (lambda: bench_train(recipe="tiny", steps=0, **FEW), "--steps are at least 1"),
        (lambda: bench_train(recipe="digit-strings", **FEW), "not of images of classes"),
        (lambda: bench_load(data="x", recipe="digit-strings", **FEW), "not of images of classes"),
        (lambda: bench_tokenize(vae="x", recipe="tiny", **FEW), "leave one out"),
    ],
)
def test_impossible_asks_are_refused_before_anything_is_loaded(monkeypatch, work, told):
    for name in ("load_generator", "fresh_model"):
        monkeypatch.setattr(SAMPLING, name, None)
    with pytest.raises(ConfigError, match=told):
        work()


def test_numbers_that_are_none_are_wrong_usage():
    done = runner.invoke(app, "bench sample --size tiny --batch 1,many")
    assert done.exit_code == 2
    assert "as in 1,64" in done.output
