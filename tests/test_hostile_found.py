"""What fuzzing found, each as the smallest case of its kind."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from latentlm_core import files
from latentlm_core.artifacts import load_generator, load_tokenizer
from latentlm_core.config import digest_of
from latentlm_core.data.audio import read_audio
from latentlm_core.data.media import ALWAYS_PIXELS, MAX_PIXELS_PER_BYTE, read_image, write_png
from latentlm_core.data.sources import open_source
from latentlm_core.data.texts import open_texts
from latentlm_core.errors import (
    MAX_CHARS,
    ArtifactError,
    ConfigError,
    CorruptFileError,
    DataError,
    LatentLMError,
)
from latentlm_core.evaluation.npz import npz_member
from latentlm_core.evaluation.spoken_items import read_spoken_items
from latentlm_core.hub import is_hub_id
from latentlm_core.importing import import_vibevoice
from latentlm_core.progress import SILENT
from latentlm_core.recipes import lm_recipe
from latentlm_core.workflows.doctor import doctor
from latentlm_core.workflows.evaluate_drawing import evaluate_text_to_image
from latentlm_core.workflows.spoken_folder import SpokenFolder
from latentlm_core.workflows.workspace import find_export
from tests.hostile import bounded_memory, bounded_time
from tests.hostile_folders import lay_out, make_exports
from tests.hostile_media import make_audio, make_images, png
from tests.tiny_vibevoice import TINY

CPU = torch.device("cpu")


# --- media -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [8, 16])
def test_a_header_of_an_image_takes_no_memory(depth):
    header = png(9_000, 9_000, depth, 0, [(b"IDAT", b"x")])
    assert 9_000 * 9_000 > ALWAYS_PIXELS > MAX_PIXELS_PER_BYTE * len(header)
    with bounded_memory(64), pytest.raises(DataError, match="9000x9000, which its 58 bytes cannot"):
        read_image(header, "a.png")


def test_a_white_image_is_read_although_it_is_small():
    buffer = io.BytesIO()
    PIL.Image.new("1", (4_000, 2_000), 1).save(buffer, "PNG", optimize=True)
    assert max(ALWAYS_PIXELS, 1000 * len(buffer.getvalue())) < 4_000 * 2_000
    assert read_image(buffer.getvalue(), "a.png").min() == 255


def test_a_chunk_that_says_4_gb_takes_no_memory(tmp_path):
    """Python takes memory for all that it is asked to read of a file, and Pillow asks."""
    content = make_images(tmp_path)[0].replace(b"\x00\x00\x00\x00IEND", b"\xf0\x00\x00\x00IEND")
    (tmp_path / "a.png").write_bytes(content)
    with bounded_memory(64):
        assert read_image(tmp_path / "a.png", "a.png").shape == (12, 10, 3)


def test_sixteen_bits_become_eight_by_rounding():
    grey = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for kind in (np.uint16, np.int32):
        buffer = io.BytesIO()
        PIL.Image.fromarray(grey.astype(kind)).save(buffer, "TIFF")
        expected = np.round(grey.astype(np.float64) / 257)
        assert np.array_equal(read_image(buffer.getvalue(), "a.tif")[..., 0], expected)


def test_a_header_of_a_recording_takes_no_memory(tmp_path):
    sound = make_audio(tmp_path)[5]
    assert sound[:4] == b"fLaC"
    rate, channels, bits = 8_000, 1, 16
    word = rate << 44 | (channels - 1) << 41 | (bits - 1) << 36 | 99_000_000
    content = sound[:18] + struct.pack(">Q", word) + sound[26:]
    with (
        bounded_memory(64),
        pytest.raises(CorruptFileError, match=r"a\.flac is no audio, or broken"),
    ):
        read_audio(content, "a.flac")


# --- npz -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", ["(" * 5000, "{'descr': ", "[1, 2", "\x00", "lambda: 0", "1e999"]
)
def test_a_header_of_an_array_that_is_no_header(tmp_path, header):
    encoded = header.encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", content)
    with (
        pytest.raises(CorruptFileError, match=r"a\.npz\[mu\] has no readable npy header"),
        npz_member(tmp_path / "a.npz", "mu"),
    ):
        pass


# --- exports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return make_exports(tmp_path_factory.mktemp("exports"))


def forged(folder: Path, content: dict[str, bytes], *keys: str, value: object) -> Path:
    """An export in which one value of config.json is another, and the seal vouches for it."""
    lay_out(folder, content)
    config = files.read_sealed_json(folder / "config.json")
    node = config
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    sealed = config | {files.SEAL: digest_of(config)}
    (folder / "config.json").write_text(json.dumps(sealed))
    return folder


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("pages", ("model", "backbone", "num_layers"), 10**9),
        ("pages", ("model", "backbone", "num_layers"), 500),
        ("pages", ("model", "backbone", "hidden_size"), 2**24),
        ("pages", ("model", "head", "diffusion", "num_train_timesteps"), 10**9),
        ("pages", ("model", "head", "noise_repeats"), 10**9),
        ("pages", ("model", "vocab_size"), 10**12),
        ("dit", ("model", "grid"), [2**15, 2**15]),
        ("dit", ("grid",), [2**40, 2**40]),
        ("images", ("tokenizer", "network", "channels"), [2**24] * 16),
        ("images", ("tokenizer", "latent_channels"), 2**24),
        ("images", ("tokenizer", "network", "num_blocks"), 10**9),
        ("speech", ("tokenizer", "network", "base_channels"), 2**40),
        ("speech", ("tokenizer", "network", "num_blocks"), [10**9, 1, 1]),
    ],
)
def test_sizes_of_networks_take_no_memory_that_the_weights_do_not(
    exports, tmp_path, name, keys, value
):
    folder = forged(tmp_path / "export", exports[name], *keys, value=value)
    load = load_tokenizer if name in ("images", "speech") else load_generator
    with bounded_time(20), bounded_memory(64), pytest.raises(LatentLMError, match=r"config\.json"):
        load(folder, CPU)


@pytest.mark.parametrize("field", ["shift", "scale"])
def test_a_normalisation_of_nothing(exports, tmp_path, field):
    folder = forged(tmp_path / "export", exports["dit"], "stats", field, value=[])
    with pytest.raises(CorruptFileError, match=rf"config\.json: stats\.{field}"):
        load_generator(folder, CPU)
    assert doctor(target=str(folder)).details["faults"] == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "text.json"])
def test_a_pipe_is_no_file(exports, tmp_path, name):
    lay_out(tmp_path / "export", exports["pages"])
    (tmp_path / "export" / name).unlink()
    os.mkfifo(tmp_path / "export" / name)
    with bounded_time(10), pytest.raises(ArtifactError, match=f"There is no file .*{name}"):
        load_generator(tmp_path / "export", CPU)


def test_a_recipe_of_a_network_that_nothing_could_hold():
    with pytest.raises(LatentLMError, match=r"model\.backbone\.num_layers"):
        lm_recipe("mnist", ["model.backbone.num_layers=1000000000"])


@pytest.mark.parametrize("value", [[], ["mnist"], {"a": 1}, 3, True, False])
def test_a_recipe_that_begins_with_no_name(tmp_path, value):
    files.write_json(tmp_path / "a.json", {"recipe": value})
    with pytest.raises(ConfigError, match="recipe is the name of a recipe"):
        lm_recipe(str(tmp_path / "a.json"))


def test_ratios_of_others_without_their_depths(tmp_path):
    config = {key: value for key, value in TINY.items() if key != "encoder_depths"}
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(ArtifactError, match="must be one more than encoder_ratios"):
        import_vibevoice(tmp_path, tmp_path / "export")


# --- names -----------------------------------------------------------------------------------


def test_messages_are_one_line_that_a_terminal_shows_and_does_not_obey():
    error = DataError("a\nb \x1b[31m \u202e \ud800 caf\u00e9 \U0001f600", hint="c\rd")
    assert str(error) == "a\\nb \\x1b[31m \\u202e \\ud800 caf\u00e9 \U0001f600"
    assert error.hint == "c\\rd"
    long = str(DataError("a" * 9000 + "b"))
    assert len(long) < MAX_CHARS + 10
    assert long.startswith("aaa")
    assert long.endswith("ab")


@pytest.mark.parametrize("name", ["a\x00b", "a\ud800b", "", "..", "x" * 300])
def test_names_that_no_file_has(tmp_path, name):
    path = tmp_path / name if name else Path("/")
    for write in (lambda: files.write_text(path, "a"), lambda: _make(path)):
        with pytest.raises(ArtifactError):
            write()
    assert not any(tmp_path.iterdir())


def _make(path: Path) -> None:
    with files.write_folder(path):
        pass


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "\ud800", "y/" * 3000])
def test_names_that_are_too_long_or_none_are_not_there(name):
    for read in (
        lambda: open_source(name),
        lambda: open_source(f"cifar10:{name}"),
        lambda: open_texts(name),
        lambda: find_export(name, "generator", SILENT),
        lambda: read_image(Path(name), "it"),
    ):
        with pytest.raises(LatentLMError):
            read()
    assert not is_hub_id(name)


def test_rows_of_samples_that_are_none(tmp_path):
    rows = tmp_path / "samples.jsonl"
    for row in ({"file": "x" * 300, "text": "a"}, {"file": "\x00", "text": "a"}):
        rows.write_text(json.dumps(row))
        with pytest.raises(DataError, match="there is no file"):
            read_spoken_items(tmp_path)
    for text in (
        '{"index": 1e999, "file": "a", "text": "b"}',
        '{"index": 0, "file": 3, "text": "b"}',
    ):
        rows.write_text(text)
        with pytest.raises(CorruptFileError, match="is no row of a sample"):
            SpokenFolder(tmp_path, {}, 8000).missing(1)


def test_settings_of_samples_that_are_no_object(tmp_path):
    write_png(tmp_path / "000000.png", np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(CorruptFileError, match=r"settings\.json is not an object"):
        evaluate_text_to_image(samples=str(tmp_path), extractor="none", clip="none", device="cpu")
