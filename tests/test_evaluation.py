"""What reports must say, reconstruction in closed form, and the classifier."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from latentlm_core.config import build
from latentlm_core.data.sources import open_source
from latentlm_core.errors import ConfigError, CorruptFileError, DataError
from latentlm_core.evaluation.classifier import (
    ClassifierExtractor,
    ImageClassifier,
    class_accuracy,
    deform,
    predict,
    train_classifier,
)
from latentlm_core.evaluation.image_sets import ImageSet, image_array, image_folder, image_source
from latentlm_core.evaluation.images import METRICS, ImageReport, evaluate_images
from latentlm_core.evaluation.reconstruction import evaluate_reconstruction, psnr, ssim
from latentlm_core.evaluation.statistics import load_statistics, reference_statistics
from latentlm_core.evaluation.sweep import SweepPoint, grid_points, sweep
from latentlm_core.runtime import generator
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAE, SigmaVAEConfig
from tests.tiny_evaluation import SIZE, pixels, random_extractor, save_pngs
from tests.tiny_training import Listener

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


@pytest.mark.parametrize(
    ("ours", "theirs", "warning"),
    [
        ([2] * 24, list(range(24)), "cover 1 of the 24 classes"),
        ([0, 1] * 12, [0, 1, 2] * 8, "cover 2 of the 3 classes"),
        ([2] * 24, None, "All samples are of one class."),
    ],
)
def test_classes_that_are_missing_are_warned_of(
    extractor: ClassifierExtractor, ours: list[int], theirs: list[int] | None, warning: str
) -> None:
    samples, images = (
        image_array(pixels(seed=seed), "noise", labels)
        for seed, labels in enumerate((ours, theirs))
    )
    direct = evaluate_images(["fid"], samples, images, extractor)
    stored = evaluate_images(["fid"], samples, reference_statistics(images, extractor), extractor)
    for report in (direct, stored):
        assert [text for text in report.warnings if warning in text]


def test_classes_that_are_all_there_are_not_warned_of(extractor: ClassifierExtractor) -> None:
    samples = image_array(pixels(), "noise", [0, 1, 2] * 8)
    for reference in (samples, image_array(pixels(), "noise")):
        warnings = evaluate_images(["fid"], samples, reference, extractor).warnings
        assert not [text for text in warnings if "class" in text]


def test_a_sweep_finds_the_least_distance(extractor: ClassifierExtractor) -> None:
    reference = reference_statistics(image_array(pixels(), "noise"), extractor)

    def draw(point: SweepPoint) -> ImageSet:
        return image_array(pixels(seed=0 if point.guidance_scale == 2.0 else 1), "drawn")

    points, progress = grid_points([1.0, 2.0, 3.0], [5, 10]), Listener()
    report = sweep(points, draw, reference, extractor, progress=progress)
    assert progress.warnings == list(report.warnings)
    assert any("24 samples are fewer than 2048" in warning for warning in report.warnings)
    assert len(report.rows) == 6
    assert (report.best.guidance_scale, report.best.num_inference_steps) == (2.0, 5)
    assert report.best.fid == pytest.approx(0.0, abs=1e-6)
    assert report.metric == f"fid[{extractor.name}]"


@pytest.mark.parametrize(
    ("scale", "steps"), [(-1.0, 5), (math.inf, 5), (math.nan, 5), (1.0, 0), (1.0, 1001)]
)
def test_points_out_of_range_are_refused(scale: float, steps: int) -> None:
    with pytest.raises(ConfigError, match=r"sweep: (guidance_scale|num_inference_steps) = "):
        grid_points([1.0, scale], [steps])


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
