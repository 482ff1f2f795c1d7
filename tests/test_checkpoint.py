import json
import shutil

import pytest
import torch

from latentlm_core.errors import ArtifactError, CorruptFileError
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.checkpoint_files import copy_strictly
from latentlm_core.training.checkpoint_state import CheckpointState

PARTS = {
    "model": {"net.weight": torch.arange(12.0).view(3, 4), "net.bias": torch.ones(3)},
    "optimizer": {"net.weight.step": torch.tensor(5.0)},
    "figures": {},
}


def save(store, step):
    state = CheckpointState(
        step=step, samples_seen=8 * step, seconds=0.1, config={"trainer": {"seed": 1, "lr": 1e-3}}
    )
    return store.save(state, PARTS)


def test_round_trip(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    folder = save(store, 1000)
    assert folder.name == "step-00001000"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    checkpoint = store.latest()
    assert checkpoint.state.step == 1000
    assert checkpoint.state.samples_seen == 8000
    assert checkpoint.state.config == {"trainer": {"seed": 1, "lr": 1e-3}}
    for part, tensors in PARTS.items():
        read = checkpoint.read(part)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_newest_are_kept_and_leftovers_go(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    (tmp_path / ".step-00000007.123.part").mkdir()
    for step in (5, 90, 100_000_000, 12):
        save(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000090", "step-100000000"]
    assert store.latest().state.step == 100_000_000


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_is_refused_by_name(tmp_path, name, place):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 3)
    path = save(store, 4) / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"step-00000004.{name}") as caught:
        store.latest()
    assert "step-00000004" in caught.value.hint
    shutil.rmtree(path.parent)
    assert store.latest().state.step == 3


@pytest.mark.parametrize("name", ["model.safetensors", "figures.safetensors", "state.json"])
def test_a_truncated_or_missing_file_is_refused_by_name(tmp_path, name):
    store = CheckpointStore(tmp_path, keep=1)
    path = save(store, 4) / name
    path.write_bytes(path.read_bytes()[:-1])
    if name == "state.json":
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match=name):
        store.latest()
    path.unlink()
    with pytest.raises(CorruptFileError, match=name):
        store.latest()


def test_another_format_is_refused(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 4)
    monkeypatch.setattr("latentlm_core.training.checkpoint_state.FORMAT_VERSION", 2)
    with pytest.raises(ArtifactError, match="format version 1; this version of latentlm reads 2"):
        store.latest()


def test_a_changed_value_in_the_state_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    path = save(store, 4) / "state.json"
    content = json.loads(path.read_text())
    content["state"]["step"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="its checksum differs"):
        store.latest()


def test_a_failed_save_harms_nothing(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 4)
    state = CheckpointState(step=5, samples_seen=0, seconds=0.0, config={})
    with pytest.raises(ArtifactError, match="cannot be written"):
        store.save(state, {"no-such-folder/model": {}, "x" * 300: {}})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert store.latest().state.step == 4


def test_copy_strictly_names_all_differences_and_copies_nothing():
    target = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    source = {"a": torch.ones(2), "b": torch.ones(3, 1), "d": torch.ones(1)}
    with pytest.raises(ArtifactError) as caught:
        copy_strictly(target, source, "model.safetensors")
    assert str(caught.value) == (
        "model.safetensors does not fit: c is missing; d is unknown; "
        "b is (3, 1) and should be (3,)."
    )
    assert target["a"].tolist() == [0.0, 0.0]
