"""Checkpoints of several processes, read by any number of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from latentlm_core.errors import CorruptFileError
from latentlm_core.files import read_safetensors, write_safetensors
from latentlm_core.training.checkpoint import CheckpointStore
from latentlm_core.training.checkpoint_state import describe, read_state, write_state
from latentlm_core.workflows.doctor_run import check_run
from tests import tiny_checkpoints as tiny
from tests.crew import crew


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Folders of checkpoints, by the number of processes and of copies."""
    folders = {}
    for size, copies in ((1, 1), (2, 1), (4, 1), (4, 2)):
        folders[size, copies] = tmp_path_factory.mktemp(f"saved{size}x{copies}")
        crew().run(size, tiny.save, folders[size, copies], 1, copies)
    return folders


@pytest.mark.parametrize("there", [(1, 1), (2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("here", [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_any_number_of_processes_reads_what_any_number_wrote(saved, there, here):
    size, copies = here
    expected = tiny.values()
    for read in crew().run(size, tiny.restore, saved[there], copies):
        assert read.keys() == expected.keys()
        for name, tensor in expected.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name


def test_each_process_writes_its_own_and_what_is_whole_is_there_once(saved):
    def names(size: int, copies: int) -> list[str]:
        return sorted(path.name for path in (saved[size, copies] / "step-00000001").iterdir())

    assert names(1, 1) == ["figures.safetensors", "model.safetensors", "state.json"]
    assert names(2, 1) == [
        "figures.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "state.json",
    ]
    numbers = sum(tensor.numel() for tensor in tiny.values().values())
    for place, folder in saved.items():
        files = [read_safetensors(path) for path in folder.glob("*/model*")]
        assert len(files) == place[0]
        assert sum(item.numel() for file in files for item in file.values()) == numbers
    rows = [len(read_safetensors(path)["even"]) for path in sorted(saved[4, 1].glob("*/model*"))]
    assert rows == [2, 2, 2, 2]


def test_one_process_writes_the_bytes_that_it_always_wrote(saved, tmp_path):
    write_safetensors(tmp_path / "plain", tiny.values())
    written = saved[1, 1] / "step-00000001" / "model.safetensors"
    assert written.read_bytes() == (tmp_path / "plain").read_bytes()


def test_what_is_saved_while_all_goes_on_is_what_was_there(saved, tmp_path):
    crew().run(2, tiny.save, tmp_path, 1, 1, True)
    for path in saved[2, 1].glob("*/*.safetensors"):
        assert (tmp_path / "step-00000001" / path.name).read_bytes() == path.read_bytes()


def test_a_process_reads_no_more_than_its_own_slices(saved):
    for there in (1, 2, 4):
        reads = crew().run(4, tiny.read_sizes, saved[there, 1], "even")
        assert reads == [[6]] * 4
    assert crew().run(2, tiny.read_sizes, saved[4, 1], "even") == [[6, 6]] * 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_understands_the_files(saved, tmp_path):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    for path in saved[4, 2].glob("*/model*"):
        shutil.copy(path, tmp_path)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tiny.values().items()}
    dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in tiny.values().items():
        assert torch.equal(targets[name], tensor)


def test_an_export_of_several_processes_has_the_bytes_of_one(tmp_path):
    write_safetensors(tmp_path / "alone", tiny.values(), {"format": "pt"})
    for size, copies in ((2, 1), (4, 2)):
        crew().run(size, tiny.export, tmp_path / "shared", copies)
        assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_network_that_is_shared_out_is_exported_as_one_that_is_not(tmp_path):
    for size in (1, 2):
        crew().run(size, tiny.export_tokenizer, tmp_path / str(size))
    files = [read_files(tmp_path / str(size)) for size in (1, 2)]
    assert files[0] == files[1]
    assert files[0].keys() == {"config.json", "model.safetensors"}


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["lm", "vae"])
def test_networks_and_optimizers_that_are_shared_out_come_back(tmp_path, kind):
    settings = {"parallel": "fsdp", "total_steps": 3, "accumulate": 4, "save_every": 3}
    expected = crew().run(2, tiny.train, tmp_path, kind, settings)[0]
    for size in (1, 2, 4):
        for read in crew().run(size, tiny.resume, tmp_path, kind, settings):
            assert read.keys() == expected.keys()
            assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_is_told_by_all_and_harms_nothing(tmp_path, rank):
    crew().run(2, tiny.save, tmp_path)
    told = crew().run(2, tiny.save_with_a_full_disk, tmp_path, rank)
    assert all("cannot be written: File name too long" in message for message in told), told
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert crew().run(2, tiny.look, tmp_path) == ["sound", "sound"]
    crew().run(2, tiny.save, tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def newest(folder: Path) -> str:
    """What is wrong with a folder's newest checkpoint."""
    with pytest.raises(CorruptFileError) as caught:
        tiny.restore(folder)
    assert "step-00000001" in caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("name", ["model-00001-of-00002", "model-00002-of-00002", "figures"])
@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "missing"])
def test_a_damaged_shard_is_refused_by_name(saved, tmp_path, name, damage):
    shutil.copytree(saved[2, 1], tmp_path / "run")
    path = tmp_path / "run" / "step-00000001" / f"{name}.safetensors"
    content = path.read_bytes()
    damaged = {
        "flipped": content[:-5] + bytes([content[-5] ^ 4]) + content[-4:],
        "shorter": content[:-1],
        "longer": content + b"\0",
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    assert str(path) in newest(tmp_path / "run")
    told = crew().run(2, tiny.look, tmp_path / "run")
    assert all(str(path) in message for message in told), told


def test_files_that_are_not_the_checkpoints_are_refused_by_name(saved, tmp_path):
    shutil.copytree(saved[2, 1], tmp_path / "run")
    folder = tmp_path / "run" / "step-00000001"
    (folder / ".DS_Store").touch()
    tiny.restore(tmp_path / "run")
    for name in ("model-00003-of-00003.safetensors", "weights.pt"):
        (folder / name).write_bytes(b"")
        assert f"{folder / name} is damaged" in newest(tmp_path / "run")
        (folder / name).unlink()


def reseal(folder: Path) -> None:
    """Make a checkpoint believe in the files that it has."""
    files = {path.name: describe(path) for path in folder.glob("*.safetensors")}
    write_state(folder, read_state(folder).model_copy(update={"files": files}))


def test_a_sealed_checkpoint_without_one_of_its_shards_is_refused(saved, tmp_path):
    shutil.copytree(saved[4, 1], tmp_path / "run")
    folder = tmp_path / "run" / "step-00000001"
    (folder / "model-00003-of-00004.safetensors").unlink()
    reseal(folder)
    assert "model-00003-of-00004.safetensors is damaged: it is missing" in newest(tmp_path / "run")


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ("{", "does not say where"),
        ('{"even": {"saved_offsets": [-1, 0], "shape": [8, 3]}}', "does not say where"),
        ('{"odd": {"saved_offsets": [0, 0], "shape": [8, 3]}}', "about other tensors"),
        ('{"even": {"saved_offsets": [6, 0], "shape": [8, 3]}}', "does not lie inside"),
        ('{"even": {"saved_offsets": [0], "shape": [8, 3]}}', "does not lie inside"),
        ('{"even": {"saved_offsets": [0, 0], "shape": [9, 3]}}', "even is not whole"),
    ],
)
def test_shards_that_do_not_make_up_their_tensor_are_refused(saved, tmp_path, places, reason):
    shutil.copytree(saved[1, 1], tmp_path / "run")
    folder = tmp_path / "run" / "step-00000001"
    path = folder / "model.safetensors"
    write_safetensors(path, {"even": torch.zeros(3, 3)}, {"DCP_SHARDING_INFO": places})
    reseal(folder)
    message = newest(tmp_path / "run")
    assert str(path) in message
    assert reason in message


def test_doctor_examines_every_shard(saved, tmp_path):
    shutil.copytree(saved[2, 1], tmp_path / "checkpoints")
    found = {finding.what: finding for finding in check_run(tmp_path)}
    assert found["checkpoint"].state == "ok"
    assert "3 files have their checksums" in found["checkpoint"].message
    folder = tmp_path / "checkpoints" / "step-00000001"
    path = folder / "model-00002-of-00002.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), file.get_tensors()
    tensors["even"][3, 1] = torch.nan
    write_safetensors(path, tensors, metadata)
    reseal(folder)
    found = {finding.what: finding for finding in check_run(tmp_path)}
    assert found["checkpoint"].state == "fault"
    assert f"even of {path.name}" in found["checkpoint"].message


def test_the_metadata_of_a_shard_say_where_it_lies(saved):
    path = saved[4, 2] / "step-00000001" / "model-00002-of-00004.safetensors"
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert places["uneven"] == {"saved_offsets": [3, 0, 0], "shape": [5, 2, 2]}
    assert places["columns"] == {"saved_offsets": [0, 3], "shape": [3, 6]}
    assert CheckpointStore(saved[4, 2], keep=1).latest() is not None
