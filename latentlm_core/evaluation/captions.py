"""How near captions are to references: exact match, and CIDEr-D (Vedantam et al. 2015).

Notable choices:
- CIDEr-D is written here: its first library needs compiled code and Java and has stood still since
  2020, the kept one (aac-metrics) brings audio models. Scores equal that first library's.
- The tokenisation is part of the number: lower case, words are runs of letters and digits, joined
  by inner hyphens or apostrophes, and punctuation is dropped. The Penn Treebank tokeniser of the
  published figures differs from this in contractions ("do n't").
- Document frequencies come from the references that are given, so a score belongs to its data set,
  and more images of the same kind change it.

Axes: N images.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from latentlm_core.errors import DataError

MAX_ORDER = 4
"""Longest n-grams that are counted."""
LENGTH_SIGMA = 6.0
"""Words that a caption may be longer or shorter before that costs 39 %."""
SCALE = 10.0
"""Score of a caption that is its only reference, where none of its orders is in all images."""

NGram = tuple[str, ...]


def normalise_caption(text: str) -> str:
    """What exact match compares: lower case, single spaces, no final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def is_exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether a caption is one of its references, both normalised."""
    return normalise_caption(prediction) in map(normalise_caption, references)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of captions that are one of their references, both normalised.

    Args:
        predictions: N captions.
        references: one or more captions of each image.

    Raises:
        DataError: none, another number of references than captions, or an image without one.
    """
    _check(predictions, references)
    found = map(is_exact, predictions, references)
    return sum(found) / len(predictions)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a set of captions, the mean of ``cider_scores``; papers print it times 100.

    Raises:
        DataError: as ``cider_scores``.
    """
    return math.fsum(cider_scores(predictions, references)) / len(predictions)


def cider_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, ...]:
    """CIDEr-D of each caption (N,), 0 to 10.

    The mean over n = 1 to 4 and over an image's references of the cosine of n-gram counts weighted
    by idf, where no n-gram counts for more than in the reference, times a Gaussian of the
    difference in length.

    Args:
        predictions: N captions.
        references: one or more captions of each image; what is in all N images counts nothing.

    Raises:
        DataError: fewer than two images, another number of references than captions, or an image
            without a reference.
    """
    _check(predictions, references)
    if len(predictions) < 2:
        raise DataError("CIDEr needs two images or more: one has no document frequencies.")
    counted = [[_count(caption) for caption in captions] for captions in references]
    in_images = Counter(gram for captions in counted for gram in set().union(*captions))
    idf = {gram: math.log(len(counted) / images) for gram, images in in_images.items()}
    unseen = math.log(len(counted))
    scores = []
    for prediction, captions in zip(predictions, counted, strict=True):
        found = _Weighted.of(_count(prediction), idf, unseen)
        near = [found.similarity(_Weighted.of(caption, idf, unseen)) for caption in captions]
        scores.append(SCALE * math.fsum(near) / len(near))
    return tuple(scores)


def words(caption: str) -> list[str]:
    """The words of a caption, as CIDEr counts them."""
    return _WORD.findall(caption.lower().replace("’", "'"))


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A caption as tf-idf vectors.

    Attributes:
        orders: weights of its n-grams, for n = 1 to 4.
        norms: lengths of these vectors.
        num_words: in the caption.
    """

    orders: tuple[Mapping[NGram, float], ...]
    norms: tuple[float, ...]
    num_words: int

    @classmethod
    def of(cls, counts: Counter[NGram], idf: Mapping[NGram, float], unseen: float) -> "_Weighted":
        orders: tuple[dict[NGram, float], ...] = tuple({} for _ in range(MAX_ORDER))
        for gram, count in counts.items():
            orders[len(gram) - 1][gram] = count * idf.get(gram, unseen)
        norms = tuple(math.hypot(*order.values()) for order in orders)
        return cls(orders, norms, sum(counts[gram] for gram in counts if len(gram) == 1))

    def similarity(self, reference: "_Weighted") -> float:
        """Mean over the orders, 0 to 1."""
        cosines = [
            sum(min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in mine)
            / (norm * their_norm)
            for mine, theirs, norm, their_norm in zip(
                (order.items() for order in self.orders),
                reference.orders,
                self.norms,
                reference.norms,
                strict=True,
            )
            if norm * their_norm > 0
        ]
        longer = self.num_words - reference.num_words
        return math.exp(-(longer**2) / (2 * LENGTH_SIGMA**2)) * math.fsum(cosines) / MAX_ORDER


def _count(caption: str) -> Counter[NGram]:
    return Counter(_grams(words(caption)))


def _grams(found: Sequence[str]) -> Iterator[NGram]:
    for order in range(1, MAX_ORDER + 1):
        for start in range(len(found) - order + 1):
            yield tuple(found[start : start + order])


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"There must be a caption for each image that has references, not "
            f"{len(predictions)} for {len(references)}."
        )
    if not all(references):
        missing = [bool(captions) for captions in references].index(False)
        raise DataError(f"Image {missing} has no reference to compare its caption with.")


_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
