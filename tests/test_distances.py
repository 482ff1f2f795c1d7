"""Distances between sets of features: closed forms and torch-fidelity's own numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from latentlm_core.errors import DataError
from latentlm_core.evaluation.classifier import ClassifierExtractor
from latentlm_core.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from latentlm_core.evaluation.features import Moments, digest_tensors, extract_features
from latentlm_core.evaluation.image_sets import image_array
from latentlm_core.evaluation.statistics import reference_statistics
from latentlm_core.runtime import generator
from tests.tiny_evaluation import pixels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator("normal", seed))


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
