"""What may differ when a run goes on, and runs from before a field existed."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from latentlm_core.config import Config
from latentlm_core.errors import ArtifactError
from latentlm_core.training.checkpoint_state import read_state, write_state
from latentlm_core.training.optim import OptimizerConfig
from latentlm_core.training.run_config import differences, with_defaults
from tests.tiny_training import make, noisy, traces


class Inner(Config):
    kind: Literal["inner"] = "inner"
    sizes: tuple[int, ...] = (1, 2)
    rate: float


class Outer(Config):
    name: str
    inner: Inner = Field(default_factory=lambda: Inner(rate=0.5))
    depth: int = 3


def test_differences_are_named_by_dotted_key():
    saved = {"trainer": {"seed": 1, "log_every": 5}, "data": "mnist", "old": 1}
    current = {"trainer": {"seed": 2, "log_every": 7}, "data": "mnist", "new": None}
    assert differences(saved, current, frozenset({"trainer.log_every"})) == [
        "new is 'absent' there and None here",
        "old is 1 there and 'absent' here",
        "trainer.seed is 1 there and 2 here",
    ]
    assert differences(saved, saved) == []


@pytest.mark.parametrize(
    ("saved", "filled"),
    [
        ({"name": "a"}, {"name": "a", "depth": 3, "inner": Inner(rate=0.5).to_dict()}),
        (
            {"name": "a", "depth": 4, "inner": {"rate": 2.0}},
            {"name": "a", "depth": 4, "inner": Inner(rate=2.0).to_dict()},
        ),
        ({"old": 1, "inner": {"rate": 2.0, "sizes": [3]}}, None),
    ],
)
def test_a_field_that_was_not_there_had_its_default(saved, filled):
    schema = Outer(name="b", depth=7, inner=Inner(rate=9.0, sizes=(5,)))
    whole = {"old": 1, "depth": 3, "inner": {"rate": 2.0, "sizes": [3], "kind": "inner"}}
    assert with_defaults(saved, schema.to_dict(), schema) == (filled or whole)
    nested = with_defaults({"recipe": saved}, {"recipe": schema.to_dict()}, {"recipe": schema})
    assert nested == {"recipe": filled or whole}


def test_what_is_not_asked_for_and_what_nobody_knows_stays_absent():
    schema = Outer(name="b")
    assert with_defaults({}, {"depth": 7}, schema) == {"depth": 3}
    assert with_defaults({"data": {}}, {"data": {"new": 1}}, {"recipe": schema}) == {"data": {}}


def forget(folder: Path, *keys: str) -> None:
    """Make the newest checkpoint one from before these fields existed."""
    newest = max((folder / "checkpoints").iterdir())
    state = read_state(newest)
    config: dict[str, Any] = json.loads(json.dumps(state.config))
    for key in keys:
        *path, name = key.split(".")
        node = config
        for part in path:
            node = node[part]
        del node[name]
    write_state(newest, state.model_copy(update={"config": config}))


def test_a_run_from_before_a_field_existed_goes_on(tmp_path):
    recipe = Outer(name="a")

    def trainer(folder: Path, **changes: Any) -> Any:
        changed = recipe.model_copy(update=changes)
        optimizer = OptimizerConfig(lr=0.02, schedule="constant", warmup_steps=2)
        run_config = {"recipe": changed.to_dict()}
        return lambda steps, **config: make(
            folder,
            noisy(),
            optimizer=optimizer,
            run_config=run_config,
            schema={"recipe": changed},
            total_steps=steps,
            **config,
        ).run()

    trainer(tmp_path / "whole")(9)
    trainer(tmp_path / "run")(6)
    forget(
        tmp_path / "run",
        "recipe.depth",
        "recipe.inner.sizes",
        "trainer.ema_decay",
        "trainer.keep_every",
        "optimizers.main.final_lr_ratio",
    )
    with pytest.raises(ArtifactError) as caught:
        trainer(tmp_path / "run", depth=4)(9, ema_decay=0.5)
    assert str(caught.value).endswith(
        "another configuration: recipe.depth is 3 there and 4 here; "
        "trainer.ema_decay is 0.9999 there and 0.5 here."
    )
    assert trainer(tmp_path / "run")(9).resumed_from == 6
    assert traces(tmp_path / "run")[0] == traces(tmp_path / "whole")[0]
