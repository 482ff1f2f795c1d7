"""latentlm bench: every command measures, ratios are true, and impossible asks end early."""

import importlib
import json
import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from latentlm_cli.app import app
from latentlm_core.artifacts import (
    GeneratorExport,
    TokenizerExport,
    save_generator,
    save_tokenizer,
)
from latentlm_core.data.caching import encode_source
from latentlm_core.data.sources import open_source
from latentlm_core.draws import Draws
from latentlm_core.errors import ConfigError, LatentLMError
from latentlm_core.layout import SequenceLayout
from latentlm_core.models.few_step import FewStepConfig
from latentlm_core.recipes import lm_recipe, vae_recipe
from latentlm_core.runtime import generator
from latentlm_core.sampling import Request, SamplerConfig, make_engine
from latentlm_core.tokenizers.base import LatentStats
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
from latentlm_core.workflows.bench_cost import forward_flops, sampling_cost, training_flops
from latentlm_core.workflows.bench_plain import plain_sampling
from latentlm_core.workflows.bench_sample import fresh_model, sized_model
from tests.test_decoding import Ear

CPU = torch.device("cpu")
FEW = {"repeats": 2, "warm_up": 0, "device": "cpu"}
RATES = {"median", "min", "max"}
SAMPLING = importlib.import_module("latentlm_core.workflows.bench_sample")
"""The module, whose name in the package is its function's."""
runner = CliRunner(env={"RANK": None})


def tiny(kind: str = "tiny", num_latents: int = 4):
    return sized_model(lm_recipe(kind).model, num_latents)


def asked(count: int, null: int, num_latents: int) -> list[Request]:
    return [Request((index,), (null,), num_latents, index) for index in range(count)]


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


@pytest.mark.parametrize("size", ["tiny", "dit-tiny"])
def test_sample_compares_with_the_reference_in_one_run(size):
    rows = check_details(run(f"sample --size {size} --latents 4 --batch 2,1 --steps 3"))
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row["images_per_second"]) == RATES
        ratio = row["images_per_second"]["median"] / row["reference_images_per_second"]["median"]
        assert row["ratio"] == pytest.approx(ratio, rel=0.01)
        assert row["largest_difference"] < 1e-4
        assert row["mode"] == "eager"
        assert row["peak_megabytes"] is None or row["peak_megabytes"] >= 0


def test_sample_shows_a_table_and_names_a_busy_machine(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    line = "bench sample --size tiny --latents 4 --batch 2 --steps 2 --cfg 1 --repeats 1"
    done = runner.invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "batch 2.ratio" in done.stdout
    assert ", busy" in done.stdout
    assert "99 processes run" in done.stderr


def test_bfloat16_is_measured_on_both_sides(monkeypatch):
    dtypes = set()

    def noting(model, requests, config):
        dtypes.update(part.dtype for part in model.parameters())
        return plain_sampling(model, requests, config)

    monkeypatch.setattr(SAMPLING, "plain_sampling", noting)
    result = bench_sample(
        size="tiny",
        num_latents=4,
        batches=(2,),
        num_inference_steps=2,
        dtype="bfloat16",
        mode="eager",
        **FEW,
    )
    assert dtypes == {torch.bfloat16}
    assert result.details["rows"][0]["largest_difference"] < 0.1


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
    assert found["details"]["ceilings"]["teraflops"] > 0


def test_train_against_encoding_at_every_step(latents):
    line = f"train --recipe tiny --data {latents} --encode --batch 4 --steps 2"
    (row,) = check_details(run(line))
    ratio = row["images_per_second"]["median"] / row["encoding_images_per_second"]["median"]
    assert row["ratio"] == pytest.approx(ratio, rel=0.01)


def test_a_dit_is_trained_too(latents):
    (row,) = run(f"train --recipe dit-tiny --data {latents} --batch 4 --steps 1")["details"]["rows"]
    assert row["steps_per_second"]["median"] > 0


def test_tokenize_tells_the_share_of_each_stage():
    (row,) = check_details(run("tokenize --recipe tiny --batch-size 8"))
    assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
    for stage in ("read", "encode", "decode"):
        assert set(row[f"{stage}_images_per_second"]) == RATES


def test_load_reads_a_set_and_tells_who_waits(latents):
    found = run(f"load --data {latents} --recipe tiny --batch-size 8 --steps 3")
    (row,) = check_details(found)
    per_example = row["megabytes_per_second"]["median"] / row["examples_per_second"]["median"]
    stored = sum(path.stat().st_size for path in latents.glob("*.safetensors"))
    assert per_example == pytest.approx(stored / found["figures"]["examples"] / 1e6, rel=0.01)
    assert 0 < row["data_wait_share"] < 1


@pytest.mark.parametrize("kind", ["tiny", "dit-tiny"])
def test_sample_of_a_model_that_was_trained(tmp_path, kind):
    config = lm_recipe(kind).model.complete((2, 2), 3, 6)
    classes = tuple("abcde")
    stats = LatentStats(shift=(0.0,), scale=(1.0,))
    export = GeneratorExport(
        model=config, stats=stats, grid=(2, 2), classes=classes, tokenizer_sha256="0" * 64
    )
    save_generator(tmp_path / "model", fresh_model(config), export, None)
    found = run(f"sample --model {tmp_path / 'model'} --batch 7 --steps 2")
    assert found["figures"]["latents"] == 4
    assert found["details"]["rows"][0]["largest_difference"] < 1e-4


def test_a_distilled_head_has_no_reference():
    config = tiny().model_copy(update={"few_step": FewStepConfig(guidance_scale=2.0)})
    with pytest.raises(ConfigError, match="no plain loop"):
        SAMPLING._require_mode(config, "auto")


# --- what they are made of -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["tiny", "dit-tiny"])
def test_the_plain_loop_draws_what_the_engine_draws(kind, scale):
    config = SamplerConfig(num_inference_steps=4, guidance_scale=scale)
    model = fresh_model(tiny(kind))
    requests = asked(3, model.config.vocab_size - 1, 4)
    ours = make_engine(model, config, "eager").generate(requests)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(plain_sampling(model, requests, config), ours, rtol=1e-4, atol=1e-4)


def test_latents_that_differ_are_not_compared(monkeypatch):
    monkeypatch.setattr(
        SAMPLING,
        "plain_sampling",
        lambda model, requests, config: torch.ones(1, 4, 16),
    )
    with pytest.raises(LatentLMError, match="times do not compare"):
        bench_sample(size="tiny", num_latents=4, batches=(1,), num_inference_steps=2, **FEW)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["tiny", "dit-tiny"])
def test_operations_of_sampling_are_those_that_run(kind, scale):
    config = SamplerConfig(num_inference_steps=3, guidance_scale=scale)
    model = fresh_model(tiny(kind, 9))
    engine = make_engine(model, config, "eager")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.generate(asked(2, model.config.vocab_size - 1, 9))
    cost = sampling_cost(model.config, 2, 9, 3, config.is_guided)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.002)


@pytest.mark.parametrize("kind", ["tiny", "dit-tiny"])
def test_operations_of_training_are_those_that_run(kind):
    model = fresh_model(tiny(kind, 9))
    latents, ids = torch.randn(2, 10, 16), torch.zeros(2, 10, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if kind == "tiny":
            loss = model(ids, latents, SequenceLayout.of_images(2, 9), Draws(generator("x"))).latent
        else:
            loss = model.loss(latents[:, 1:], ids[:, 0], Draws(generator("x")))[0]
        forward = counter.get_total_flops()
        loss.mean().backward()
    assert forward_flops(model.config, 2, 9) == pytest.approx(forward, rel=0.02)
    assert training_flops(model.config, 2, 9) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_weights_are_read_once_a_product():
    config = tiny()
    model = fresh_model(config)
    read = sum(part.numel() for part in (*model.backbone.parameters(), *model.head.parameters()))
    times = sum(part.numel() for part in model.head.timestep_embedding.parameters())
    biases = model.head.latent_embedding.bias.numel()
    embedding = model.latent_embedding.weight.numel()
    assert sampling_cost(config, 7, 1, 1, True).weights == read - times - biases + embedding
    feed = sum(b.feed_forward.gate_up.weight.numel() for b in model.head.blocks)
    feed += sum(b.feed_forward.down.weight.numel() for b in model.head.blocks)
    more = (
        sampling_cost(config, 7, 1, 2, True).weights - sampling_cost(config, 7, 1, 1, True).weights
    )
    assert more == feed + 2 * embedding


def test_the_bound_is_of_the_ceilings():
    cost = sampling_cost(tiny(), 1, 4, 2, False)
    bounds = cost.bound_seconds(Ceilings(flops=10.0, bytes=5.0), 2)
    assert bounds == {"arithmetic": cost.flops / 10, "weight_traffic": cost.weights * 2 / 5}


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
    ("limit", "told"), [(5, "4 is the largest that was measured"), (1, "smallest that was asked")]
)
def test_a_batch_that_does_not_fit_names_what_does(limit, told):
    def measure(batch: int) -> int:
        if batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch

    with pytest.raises(LatentLMError, match=told) as caught:
        each_batch((64, 4, 2), CPU, measure)
    assert "does not fit into the memory of" in str(caught.value)


def test_a_host_without_the_memory_is_told_alike_and_other_faults_are_faults():
    with pytest.raises(LatentLMError, match="batch of 1 does not fit"):
        each_batch((1,), CPU, lambda batch: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="size"):
        each_batch((1,), CPU, lambda batch: torch.zeros(2) + torch.zeros(3))


def test_batches_are_measured_once_each_from_the_smallest_on():
    assert list(each_batch((4, 1, 4), CPU, lambda batch: -batch).items()) == [(1, -1), (4, -4)]


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: bench_sample(size="tiny", mode="graph", **FEW), "captures a CUDA graph"),
        (lambda: bench_sample(size="dit-tiny", mode="compile", **FEW), "no --mode compile"),
        (lambda: bench_sample(size="tiny", model="x", **FEW), "leave --size"),
        (lambda: bench_sample(num_latents=16, **FEW), "goes with --size"),
        (lambda: bench_sample(size="tiny", num_latents=5, **FEW), "square grid"),
        (lambda: bench_sample(size="multimodal-tiny-transfusion", **FEW), "no recipe|text and"),
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
    for name in ("load_generator", "build_generator"):
        monkeypatch.setattr(SAMPLING, name, None)
    with pytest.raises(ConfigError, match=told):
        work()


def test_numbers_that_are_none_are_wrong_usage():
    done = runner.invoke(app, "bench sample --size tiny --batch 1,many")
    assert done.exit_code == 2
    assert "as in 1,64" in done.output
