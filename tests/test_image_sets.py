"""Folders and files of images, and files of their statistics, hostile ones too."""

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from latentlm_core.data.sources import open_source
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.evaluation.classifier import ClassifierExtractor
from latentlm_core.evaluation.image_sets import (
    ImageSet,
    image_array,
    image_folder,
    image_source,
    open_images,
)
from latentlm_core.evaluation.statistics import load_statistics, reference_statistics
from tests.tiny_evaluation import SIZE, Hostile, pixels, save_pngs


def all_pixels(images: ImageSet) -> np.ndarray:
    return np.concatenate(list(images.batches(7)))


def test_a_folder_is_read_in_order_and_without_its_grid(tmp_path: Path) -> None:
    images = pixels(100)
    save_pngs(tmp_path, images)
    PILImage.fromarray(pixels(1, size=64)[0]).save(tmp_path / "grid.png")
    found = open_images(tmp_path)
    assert len(found) == 100
    assert found.image_size == (SIZE, SIZE)
    assert found.label_policy == "unknown"
    np.testing.assert_array_equal(all_pixels(found), images)


def test_labels_come_from_samples_jsonl(tmp_path: Path) -> None:
    save_pngs(tmp_path, pixels(4))
    lines = [f'{{"file": "{i:06d}.png", "class": {i % 2}}}\n' for i in range(4)]
    (tmp_path / "samples.jsonl").write_text("".join(lines))
    assert image_folder(tmp_path).labels == (0, 1, 0, 1)
    assert image_folder(tmp_path).label_policy == "balanced"
    (tmp_path / "samples.jsonl").write_text("".join(lines[:3]))
    assert image_folder(tmp_path).labels is None
    (tmp_path / "samples.jsonl").write_text('{"file": 3')
    with pytest.raises(CorruptFileError, match=r"samples.jsonl:1 must be"):
        image_folder(tmp_path)
    (tmp_path / "samples.jsonl").write_bytes(lines[0].encode() + b'{"file": "\xff", "class": 1}')
    with pytest.raises(CorruptFileError, match=r"samples.jsonl:2 must be"):
        image_folder(tmp_path)
    (tmp_path / "samples.jsonl").write_text("[" * 100_000)
    with pytest.raises(CorruptFileError, match=r"samples.jsonl:1 must be"):
        image_folder(tmp_path)


def test_the_first_images_of_a_set() -> None:
    images = image_array(pixels(9), "noise", list(range(9)))
    found = images.first(4)
    assert len(found) == 4
    assert found.labels == (0, 1, 2, 3)
    np.testing.assert_array_equal(all_pixels(found), pixels(9)[:4])
    assert len(images.first(100)) == 9


@pytest.mark.parametrize(
    ("labels", "policy"),
    [([1, 1, 1], "one class"), ([0, 0, 1], "unbalanced"), ([2, 0, 1], "balanced")],
)
def test_label_policies(labels: list[int], policy: str) -> None:
    assert image_array(pixels(3), "x", labels).label_policy == policy


def test_how_many_classes_a_set_covers(tmp_path: Path) -> None:
    assert image_array(pixels(3), "x").num_covered is None
    assert image_array(pixels(3), "x", [2, 0, 2]).num_covered == 2
    assert image_source(open_source("embedded:shapes"), SIZE).num_covered == 4
    save_pngs(tmp_path, pixels(2))
    assert image_source(open_source(str(tmp_path)), SIZE).num_covered is None


def test_a_folder_with_two_sizes_names_the_file(tmp_path: Path) -> None:
    save_pngs(tmp_path, pixels(2))
    PILImage.fromarray(pixels(1, size=8)[0]).save(tmp_path / "big.png")
    with pytest.raises(DataError, match=r"big.png is 8x8.*16x16"):
        all_pixels(image_folder(tmp_path))


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name):
        image_folder(tmp_path / name)


def test_an_npz_of_images_in_the_layout_of_adm(tmp_path: Path) -> None:
    images, labels = pixels(5), np.array([0, 1, 2, 0, 1])
    np.savez(tmp_path / "samples.npz", images, labels)
    np.savez_compressed(tmp_path / "packed.npz", images)
    found = open_images(tmp_path / "samples.npz")
    assert found.labels == (0, 1, 2, 0, 1)
    np.testing.assert_array_equal(all_pixels(found), images)
    np.testing.assert_array_equal(all_pixels(open_images(tmp_path / "packed.npz")), images)


def test_a_data_set_is_cropped_and_its_broken_images_left_out(tmp_path: Path) -> None:
    save_pngs(tmp_path / "a", pixels(3, size=40))
    (tmp_path / "a" / "000001.png").write_bytes(b"\x89PNG broken")
    images = image_source(open_source(str(tmp_path)), SIZE)
    assert all_pixels(images).shape == (2, SIZE, SIZE, 3)
    assert images.resize == "ADM centre crop to 16"


# Statistics files


def test_statistics_round_trip(tmp_path: Path, extractor: ClassifierExtractor) -> None:
    made = reference_statistics(image_array(pixels(), "noise"), extractor)
    made.save(tmp_path / "one.npz")
    made.save(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    found = load_statistics(tmp_path / "one.npz")
    np.testing.assert_array_equal(found.mean, made.mean)
    np.testing.assert_array_equal(found.covariance, made.covariance)
    assert (found.name, found.sha256, found.num) == ("noise", made.sha256, 24)
    assert found.protocol == made.protocol


def test_our_statistics_load_elsewhere_without_pickle(
    tmp_path: Path, extractor: ClassifierExtractor
) -> None:
    made = reference_statistics(image_array(pixels(), "noise"), extractor)
    made.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        assert set(file) == {"mu", "sigma", "protocol"}
        np.testing.assert_array_equal(file["sigma"], made.covariance)
        assert "noise" in str(file["protocol"])


def test_the_layout_of_adm_is_read_with_its_images(tmp_path: Path) -> None:
    covariance = np.eye(3, dtype=np.float32)
    arrays = {"mu": np.zeros(3), "sigma": covariance, "mu_s": np.zeros(2), "arr_0": pixels(2)}
    np.savez(tmp_path / "adm.npz", **arrays)
    found = load_statistics(tmp_path / "adm.npz")
    assert found.covariance.dtype == np.float64
    assert found.num is None
    assert len(found.sha256) == 64
    assert found.images is not None
    np.testing.assert_array_equal(all_pixels(found.images), arrays["arr_0"])


def hostile_files(folder: Path) -> dict[str, Path]:
    eye, nan = np.eye(3), np.full((3, 3), math.nan)
    contents = {
        "pickle": {"mu": np.array([Hostile(folder / "harm")]), "sigma": eye},
        "shape": {"mu": np.zeros(3), "sigma": np.eye(4)},
        "axes": {"mu": np.zeros((3, 1)), "sigma": eye},
        "integers": {"mu": np.zeros(3, np.int64), "sigma": eye},
        "nan": {"mu": np.zeros(3), "sigma": nan},
        "asymmetric": {"mu": np.zeros(3), "sigma": eye + np.triu(np.ones((3, 3)))},
        "missing": {"mu": np.zeros(3)},
        "record": {"mu": np.zeros(3), "sigma": eye, "protocol": np.array("{")},
    }
    paths = {}
    for name, arrays in contents.items():
        paths[name] = folder / f"{name}.npz"
        np.savez(paths[name], **arrays)
    paths["text"] = folder / "text.npz"
    paths["text"].write_text("no zip")
    paths["cut"] = folder / "cut.npz"
    paths["cut"].write_bytes(paths["shape"].read_bytes()[:-40])
    paths["lie"] = folder / "lie.npz"
    with zipfile.ZipFile(paths["lie"], "w") as archive, archive.open("mu.npy", "w") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (4096,)}
        np.lib.format.write_array_header_1_0(file, header)
    paths["absent"] = folder / "absent.npz"
    return paths


@pytest.mark.parametrize(
    "kind",
    [
        *("pickle", "shape", "axes", "integers", "nan", "asymmetric", "missing", "record"),
        *("text", "cut", "lie", "absent"),
    ],
)
def test_hostile_statistics_are_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=f"{kind}.npz"):
        load_statistics(hostile_files(tmp_path)[kind])
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "array",
    [pixels(2).astype(np.float32), pixels(2)[0], pixels(2)[..., :1], np.array([{}])],
    ids=["floats", "three axes", "grey", "pickle"],
)
def test_npz_files_that_hold_no_images_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "images.npz", array)
    with pytest.raises(DataError, match=r"images.npz\[arr_0\]"):
        open_images(tmp_path / "images.npz")
