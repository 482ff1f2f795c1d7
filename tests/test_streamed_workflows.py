"""train-vae and tokenize on sets that are read while they are used."""

import importlib

import datasets
import pytest

from latentlm_core import workflows
from latentlm_core.data import stream
from latentlm_core.data.parquet_files import ParquetFiles
from latentlm_core.data.shards import LatentSet
from latentlm_core.data.sources import open_source
from latentlm_core.errors import ArtifactError
from latentlm_core.files import sha256_file
from tests.tiny_latents import Interrupting, content
from tests.tiny_streams import write_images
from tests.tiny_training import Listener

datasets.disable_progress_bars()
TOKENIZE = importlib.import_module("latentlm_core.workflows.tokenize")
"""The module, whose name in the package is its function's."""
FEW = ["trainer.total_steps=6", "trainer.save_every=2", "trainer.log_every=2"]
SMALL = ["data.batch_size=4", "tokenizer.network.image_size=16"]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setenv("LATENTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path / "home"))


def test_shards_are_those_of_a_plain_folder_whatever_interrupts(encode, tmp_path):
    folder = write_images(tmp_path / "set", 60, broken=(21, 22))
    encode("plain", open_source(str(folder)))
    expected = content(tmp_path / "plain" / "set")
    for workers in (0, 2):
        encode(f"streamed-{workers}", open_source(f"stream:{folder}"), num_workers=workers)
        assert content(tmp_path / f"streamed-{workers}" / "set") == expected
    for moment in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            encode("stopped", open_source(f"stream:{folder}"), progress=Interrupting(moment))
        encode("stopped", open_source(f"stream:{folder}"))
        assert content(tmp_path / "stopped" / "set") == expected
        (tmp_path / "stopped" / "set").rename(tmp_path / f"done-{moment}")


def test_a_bad_connection_leaves_no_hole_in_a_set(encode, tmp_path, monkeypatch):
    folder = write_images(tmp_path / "set", 60)
    encode("plain", open_source(str(folder)))
    source = open_source(f"stream:{folder}")
    read = ParquetFiles.read

    def fail(self, number, features):
        if number == 5:
            raise ConnectionError("reset")
        return read(self, number, features)

    monkeypatch.setattr(ParquetFiles, "read", fail)
    with pytest.raises(ArtifactError, match="set cannot be read: reset") as caught:
        encode("stopped", source)
    assert caught.value.hint.startswith("Run the same command again")
    monkeypatch.setattr(ParquetFiles, "read", read)
    encode("stopped", open_source(f"stream:{folder}"))
    assert content(tmp_path / "stopped" / "set") == content(tmp_path / "plain" / "set")


class _StoppedError(Exception):
    """The machine is gone."""


def test_a_run_that_is_killed_goes_on_as_if_it_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MEMORY_BYTES", 0)
    folder = write_images(tmp_path / "set", 60)

    def train(out):
        return workflows.train_vae(
            data=f"stream:{folder}",
            recipe="tiny",
            overrides=[*FEW, *SMALL],
            out=tmp_path / out,
            device="cpu",
        )

    train("whole")
    decode = stream._Crops._complete
    calls = []

    def kill(self, asked, decoded):
        calls.append(asked)
        if len(calls) == 5:
            raise _StoppedError
        return decode(self, asked, decoded)

    monkeypatch.setattr(stream._Crops, "_complete", kill)
    with pytest.raises(_StoppedError):
        train("stopped")
    monkeypatch.setattr(stream._Crops, "_complete", decode)
    train("stopped")
    name = "export/model.safetensors"
    assert sha256_file(tmp_path / "stopped" / name) == sha256_file(tmp_path / "whole" / name)


def test_the_commands_take_a_stream_from_end_to_end(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "set", 60)
    data = f"stream:{folder}"
    plan = workflows.train_vae(data=data, recipe="tiny", device="cpu", dry_run=True)
    assert (plan.figures["training_images"], plan.figures["held_out_images"]) == (57, 3)
    workflows.train_vae(data=data, recipe="tiny", overrides=FEW, device="cpu")
    result = workflows.tokenize(data=data, device="cpu")
    latents = LatentSet.open(tmp_path / "home" / "latents" / "set")
    assert len(latents) == result.figures["examples"] == 60
    assert result.figures["images_per_second"] > 0
    assert 0 < result.figures["data_wait_share"] + result.figures["write_wait_share"] < 1
    heard = Listener()
    for name in ("WAITED_SECONDS", "WAITED_SHARE"):
        monkeypatch.setattr(TOKENIZE, name, 0.0)
    again = workflows.tokenize(data=data, out=tmp_path / "again", device="cpu", progress=heard)
    assert f"waited {again.figures['data_wait_share']:.0%} of the time" in heard.notes[-1]
    assert "images_per_second" not in workflows.tokenize(data=data, device="cpu").figures
    assert latents.manifest.data == data
    found = workflows.doctor(target=data)
    assert found.details["faults"] == 0
    assert "60 images" in found.figures["open"]
