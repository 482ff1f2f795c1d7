"""Distances between sets of features, and the Inception Score.

The Inception Score, the KID and precision-recall are torch-fidelity's own functions, called on
features that were streamed (``features.py``). That closes its traps: no cache by name, no workers,
no weights of one network given to another, precision and recall on Inception features as ADM has
them, distances in blocks instead of one N x N matrix. The Frechet distance is ours, since upstream
takes eigenvalues of a product that is not symmetric.

Axes: N images, D features, K classes.
"""

import numpy as np
from torch import Tensor

from latentlm_core.errors import DataError
from latentlm_core.evaluation.inception import import_fidelity

FIDELITY_SEED = 2020
"""torch-fidelity's own seed, for the shuffle of the IS and the subsets of the KID."""
IS_SPLITS = 10
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2), which cannot turn
    complex: equal to torch-fidelity's for covariances of full rank, faster, and without the
    failures of matrix square roots (Heusel et al. 2017, Eq. 6).

    Args:
        mean_1: (D,).
        covariance_1: (D, D), symmetric.
        mean_2: (D,).
        covariance_2: (D, D), symmetric.
    """
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariance_2 @ root)
    overlap = np.sqrt(product.clip(min=0.0)).sum()
    offset = mean_1 - mean_2
    total = offset @ offset + np.trace(covariance_1) + np.trace(covariance_2) - 2.0 * overlap
    return float(total)


def inception_score(logits: Tensor, seed: int = FIDELITY_SEED) -> tuple[float, float]:
    """Mean and standard deviation over ten splits of shuffled logits (N, K).

    Raises:
        DataError: fewer images than splits.
    """
    _require(len(logits), IS_SPLITS, "The Inception Score")
    import_fidelity()
    from torch_fidelity.metric_isc import isc_features_to_metric

    result = isc_features_to_metric(logits, IS_SPLITS, shuffle=True, rng_seed=seed % 2**32)
    return result["inception_score_mean"], result["inception_score_std"]


def kernel_distance(ours: Tensor, theirs: Tensor, seed: int = FIDELITY_SEED) -> tuple[float, float]:
    """Mean and standard deviation of the KID over subsets, with the cubic polynomial kernel.

    Args:
        ours: features of the samples (N, D).
        theirs: features of the reference (N, D).
        seed: of the choice of subsets.

    Raises:
        DataError: fewer than two images.
    """
    size = kid_subset_size(ours, theirs)
    _require(size, 2, "The KID")
    import_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    result = kid_features_to_metric(
        ours,
        theirs,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=seed % 2**32,
        verbose=False,
    )
    return result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]


def precision_recall(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Precision and recall by balls to the third neighbour (Kynkaanniemi et al. 2019).

    Args:
        ours: features of the samples (N, D).
        theirs: features of the reference (N, D).

    Raises:
        DataError: too few images to have a third neighbour.
    """
    _require(min(len(ours), len(theirs)), NEIGHBOURS + 1, "Precision and recall")
    import_fidelity()
    from torch_fidelity.metric_prc import prc_features_to_metric

    result = prc_features_to_metric(
        ours,
        theirs,
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=2000,
        save_cpu_ram=True,
        verbose=False,
    )
    return result["precision"], result["recall"]


def kid_subset_size(ours: Tensor, theirs: Tensor) -> int:
    """1,000 images, or as many as the smaller set has."""
    return min(KID_SUBSET_SIZE, len(ours), len(theirs))


def _require(count: int, least: int, metric: str) -> None:
    if count < least:
        raise DataError(f"{metric} needs {least} images or more on each side; there are {count}.")
