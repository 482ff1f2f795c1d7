import json
import math

import pytest
import torch

from latentlm_core.errors import ArtifactError, CorruptFileError
from latentlm_core.training.runlog import Means, RunLog, figures_of, last_figures, read_metrics
from latentlm_core.training.tasks import Term


def test_rows_begin_with_the_step_and_hold_finite_numbers_or_null(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl", 0)
    assert log.write(3, {"loss": 0.5, "bad": math.nan, "empty": None}) == {"loss": 0.5}
    line = log.path.read_text()
    assert line == '{"step": 3, "loss": 0.5, "bad": null, "empty": null}\n'


def test_rows_after_the_step_and_a_half_line_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path, 0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    RunLog(path, 2).write(3, {"loss": 9.0, "validation/loss": 8.0})
    rows = read_metrics(path)
    assert rows == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 9.0, "validation/loss": 8.0},
    ]
    RunLog(path, 3).write(4, {"loss": 7.0})
    assert last_figures(path) == {"loss": 7.0, "validation/loss": 8.0}


def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n[2]\n" + json.dumps({"step": 3}) + "\n")
    with pytest.raises(CorruptFileError, match=r"metrics\.jsonl line 2 is no JSON object"):
        read_metrics(path)
    with pytest.raises(ArtifactError, match="There is no file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_means_are_sums_over_counts_and_survive_a_checkpoint():
    def term(total: float, count: int) -> Term:
        return Term(torch.tensor(total, requires_grad=True), count)

    means = Means()
    means.add({"a": term(1.0, 1)})
    means.add({"a": term(5.0, 3), "b": term(2.0, 4)})
    steps = means.withdraw()
    assert list(map(figures_of, steps)) == [{"a": 1.0}, {"a": pytest.approx(5 / 3), "b": 0.5}]
    assert means.withdraw() == []
    assert means.take() == {}, "what was withdrawn counts when it is counted"
    for sums in steps:
        means.count(sums)
    resumed = Means()
    resumed.load(means.tensors())
    resumed.add({"a": term(6.0, 4), "nothing": term(0.0, 0)})
    for sums in resumed.withdraw():
        resumed.count(sums)
    assert resumed.take() == {"a": 1.5, "b": 0.5, "nothing": None}
    assert resumed.take() == {}
