"""latentlm bench sample: ours against the plain loop or another network, and what it must take."""

import importlib
import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentlm_cli.app import app
from latentlm_core.artifacts import save_generator
from latentlm_core.errors import LatentLMError
from latentlm_core.export_config import GeneratorExport
from latentlm_core.models.cost import attention_flops, block_weights
from latentlm_core.models.few_step import FewStepConfig
from latentlm_core.recipes import lm_recipe
from latentlm_core.sampling import Request, SamplerConfig, make_engine
from latentlm_core.sampling.decoding import DecodeStep
from latentlm_core.tokenizers.base import LatentStats
from latentlm_core.workflows import bench_sample
from latentlm_core.workflows.bench import Ceilings
from latentlm_core.workflows.bench_cost import sampling_cost
from latentlm_core.workflows.bench_models import fresh_model, sized_model
from latentlm_core.workflows.bench_plain import plain_sampling
from tests.test_bench import FEW, RATES, check_details, run, runner
from tests.test_decoding import Ear

SAMPLING = importlib.import_module("latentlm_core.workflows.bench_sample")
"""The module, whose name in the package is its function's."""


def tiny(kind: str = "tiny", num_latents: int = 4):
    return sized_model(lm_recipe(kind).model, num_latents)


def distilled():
    return tiny().model_copy(update={"few_step": FewStepConfig(guidance_scale=2.0)})


def asked(count: int, null: int, num_latents: int) -> list[Request]:
    return [Request((index,), (null,), num_latents, index) for index in range(count)]


def save(folder, config):
    stats = LatentStats(shift=(0.0,), scale=(1.0,))
    export = GeneratorExport(
        model=config, stats=stats, grid=(2, 2), classes=tuple("abcde"), tokenizer_sha256="0" * 64
    )
    save_generator(folder, fresh_model(config), export, None)


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


@pytest.mark.parametrize("kind", ["tiny", "dit-tiny"])
def test_sample_of_a_model_that_was_trained(tmp_path, kind):
    save(tmp_path / "model", lm_recipe(kind).model.complete((2, 2), 3, 6))
    found = run(f"sample --model {tmp_path / 'model'} --batch 7 --steps 2")
    assert found["figures"]["latents"] == 4
    assert found["details"]["rows"][0]["largest_difference"] < 1e-4


def test_sample_of_a_distilled_model_takes_its_own_settings(tmp_path):
    few_step = FewStepConfig(steps=(1, 4), guidance_scale=3.0)
    config = lm_recipe("tiny").model.complete((2, 2), 3, 6)
    save(tmp_path / "model", config.model_copy(update={"few_step": few_step}))
    found = run(f"sample --model {tmp_path / 'model'} --batch 2")
    assert found["figures"]["steps"] == 4
    assert found["details"]["options"]["guidance_scale"] == 3.0
    assert found["details"]["rows"][0]["largest_difference"] < 1e-4
    done = runner.invoke(app, f"bench sample --model {tmp_path / 'model'} --steps 2")
    assert done.exit_code == 1
    assert "distilled for 1, 4 steps" in done.stderr


def test_sample_against_another_network():
    line = "sample --size tiny --against dit-tiny --latents 4 --batch 2 --steps 3"
    found = run(line)
    (row,) = check_details(found)
    ratio = row["images_per_second"]["median"] / row["reference_images_per_second"]["median"]
    assert row["ratio"] == pytest.approx(ratio, rel=0.01)
    assert "largest_difference" not in row
    assert found["figures"]["reference"] == "dit-tiny"
    assert found["figures"]["reference_parameters"] != found["figures"]["parameters"]


def test_what_cannot_be_prepared_is_measured_eagerly_after_a_warning(monkeypatch):
    def fail(self, work):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(DecodeStep, "_compile", fail)
    ear = Ear()
    result = bench_sample(
        size="tiny",
        num_latents=4,
        batches=(2,),
        num_inference_steps=2,
        mode="compile",
        progress=ear,
        **FEW,
    )
    assert result.details["rows"][0]["mode"] == "eager"
    assert sum("times as long" in warning for warning in ear.warnings) == 1


def test_the_plain_loop_draws_with_a_distilled_head_what_the_engine_draws():
    model = fresh_model(distilled())
    config = SamplerConfig(num_inference_steps=4, guidance_scale=2.0, solver="few-step")
    requests = asked(3, model.config.vocab_size - 1, 4)
    ours = make_engine(model, config, "eager").generate(requests)
    torch.testing.assert_close(plain_sampling(model, requests, config), ours, rtol=1e-4, atol=1e-4)


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
    needless = 0
    if kind == "tiny":  # the last latent is fed as well
        backbone, rows = model.config.backbone, 4 if config.is_guided else 2
        fed = 2 * block_weights(backbone) + attention_flops(backbone, 10)
        needless = rows * backbone.num_layers * fed
    assert cost.flops + needless == pytest.approx(counter.get_total_flops(), rel=0.002)


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
