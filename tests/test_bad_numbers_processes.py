"""Bad steps of several processes: one decision, one report, whoever had the bad examples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentlm_core.errors import TrainingError
from tests import tiny_parallel
from tests.crew import crew
from tests.test_bad_numbers_culprit import FaultyTimesteps
from tests.test_parallel import assert_same
from tests.tiny_parallel import Sequences, Trained, make_lm, make_trainer, whole

SHARES = [("ddp", 4), ("fsdp", 4), ("fsdp", 1)]
"""How two processes share the weights, and a step of how many batches."""


def train_spoiled(folder: Path, config: dict[str, Any]) -> tuple[Trained, list[str]]:
    """Five steps, of which the second has a bad example."""
    trainer = make_trainer(folder, "lm", Sequences(spoiled=config["accumulate"]), **config)
    result = trainer.run()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return Trained(whole(trainer), result.figures, result.samples_seen), names


def stop_at_a_fault(folder: Path, config: dict[str, Any], fault: str) -> str:
    """A step that fails in a band of timesteps; what is said of it."""
    task, stream = make_lm()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in task.model.head.parameters():
            nn.init.normal_(parameter, std=0.1)
    task.model.head.timestep_embedding = FaultyTimesteps(task.model.head.timestep_embedding, fault)
    makers = tiny_parallel.MAKERS
    tiny_parallel.MAKERS = makers | {"lm": lambda: (task, stream)}
    try:
        make_trainer(folder, "lm", **config).run()
    except TrainingError as error:
        return str(error)
    finally:
        tiny_parallel.MAKERS = makers
    raise AssertionError("the step was finite")


def the_report(folder: Path) -> dict[str, Any]:
    (report,) = json.loads((folder / "bad-numbers.json").read_text("utf-8"))["reports"]
    return {
        name: sorted(value) if isinstance(value, list) else value
        for name, value in report.items()
        if name != "figures"
    }


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize(("how", "accumulate"), SHARES)
def test_several_processes_leave_out_what_one_does(tmp_path, policy, how, accumulate):
    config = {"accumulate": accumulate, "on_bad_numbers": policy, "save_every": 1}
    one, names = train_spoiled(tmp_path / "one", config)
    done = crew().run(2, train_spoiled, tmp_path / "two", config | {"parallel": how})
    for many, their_names in done:
        assert_same(many, one)
        assert their_names == names
    report = the_report(tmp_path / "two")
    assert report == the_report(tmp_path / "one")
    assert (report["cause"], report["name"], report["keys"]) == (
        "data",
        "latents",
        [f"{accumulate}-2"],
    )
    assert report["num_examples"] == 4 * accumulate


@pytest.mark.parametrize("fault", ["forward", "gradient"])
@pytest.mark.parametrize(("how", "accumulate"), SHARES)
def test_several_processes_find_the_culprit_that_one_does(tmp_path, fault, how, accumulate):
    config = {"accumulate": accumulate}
    stop_at_a_fault(tmp_path / "one", config, fault)
    told = crew().run(2, stop_at_a_fault, tmp_path / "two", config | {"parallel": how}, fault)
    assert told[0] == told[1]
    report = the_report(tmp_path / "two")
    assert report == the_report(tmp_path / "one")
    assert (report["cause"], report["name"]) == (fault, "model.head.timestep_embedding")
    assert report["timesteps"] == ["t250-499"]
    assert 0 < len(report["keys"]) < report["num_examples"]
