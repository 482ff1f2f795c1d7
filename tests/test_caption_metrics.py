"""Exact match and CIDEr-D against closed forms, and against the numbers of its first library."""

import math
from itertools import permutations

import pytest

from latentlm_core.errors import DataError
from latentlm_core.evaluation.captions import cider, cider_scores, exact_match, is_exact, words

REFERENCES = (
    ("a red seven on a blue background", "a red 7 on blue"),
    ("a green two left of a yellow nine",),
    ("a white one above a white one", "two white ones"),
    ("a purple zero on a green background", "the digit zero in purple"),
)
PREDICTIONS = (
    "a red seven on a green background",
    "a yellow nine left of a green two",
    "a white one above a white one a white one",
    "nothing",
)
RECORDED = (3.991201403446119, 5.85, 3.2311526808531617, 0.0)
"""CIDEr of pycocoevalcap 1.2 (``CiderScorer``) for these, recorded from a run of it."""


def test_exact_match_looks_past_case_spaces_and_the_final_stop() -> None:
    references = [["a red seven", "a seven in red"], ["two"], ["a blue one"]]
    assert exact_match(["  A  red\nSeven. ", "two.", "a blue nine"], references) == 2 / 3
    assert is_exact("A seven in red", references[0])
    assert not is_exact("a red, seven", references[0])
    assert not is_exact("a red seven..", references[0])


def test_cider_equals_the_recorded_numbers() -> None:
    assert cider_scores(PREDICTIONS, REFERENCES) == pytest.approx(RECORDED, abs=1e-12)
    assert cider(PREDICTIONS, REFERENCES) == pytest.approx(sum(RECORDED) / 4, abs=1e-12)


def test_cider_equals_its_first_library() -> None:
    scorers = pytest.importorskip(
        "pycocoevalcap.cider.cider_scorer", reason="pycocoevalcap is not installed"
    )
    scorer = scorers.CiderScorer()
    for prediction, references in zip(PREDICTIONS, REFERENCES, strict=True):
        scorer += (prediction, list(references))
    assert cider_scores(PREDICTIONS, REFERENCES) == pytest.approx(scorer.compute_score()[1])


def test_a_caption_equal_to_its_reference_scores_ten() -> None:
    references = [[captions[0]] for captions in REFERENCES]
    same = [captions[0] for captions in references]
    assert cider_scores(same, references) == pytest.approx([10.0] * 4)


def test_captions_without_a_common_word_score_nothing() -> None:
    assert cider(["x y z w", "k l m n"], [["a b c d"], ["e f g h"]]) == 0.0
    assert cider(["", "..."], [["a b c d"], ["e f g h"]]) == 0.0


def test_one_changed_word_in_closed_form() -> None:
    """Everything is in one image of two: idf log 2, cosines 3/4, 2/3, 1/2 and 0."""
    scores = cider_scores(["a b c x", "e f g h"], [["a b c d"], ["e f g h"]])
    assert scores == pytest.approx([10 * (3 / 4 + 2 / 3 + 1 / 2) / 4, 10.0])


def test_more_words_cost_by_the_gaussian_and_more_counts_are_clipped() -> None:
    """Said twice, "a b" has the counts 2, 2 and 1 ("b a"), and two words more than its reference.

    Clipped cosines: (1 + 1) / (2 sqrt 2 * sqrt 2) of words, 2 / (sqrt 5 * 1) halved of pairs.
    """
    first, second = cider_scores(["a b a b", "c d"], [["a b"], ["c d"]])
    cosines = 2 / (math.hypot(2, 2) * math.hypot(1, 1)) + 1 / math.hypot(2, 1)
    assert first == pytest.approx(10 * math.exp(-4 / 72) * cosines / 4)
    assert second == pytest.approx(10 * 2 / 4)


def test_what_every_image_shows_counts_nothing() -> None:
    assert cider(["a b c d", "a b c d"], [["a b c d"], ["a b c d"]]) == 0.0


def test_the_order_of_images_and_references_does_not_matter() -> None:
    scores = cider_scores(PREDICTIONS, REFERENCES)
    for order in permutations(range(4)):
        shuffled = cider_scores(
            [PREDICTIONS[place] for place in order], [REFERENCES[place][::-1] for place in order]
        )
        assert shuffled == pytest.approx([scores[place] for place in order], abs=1e-12)


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words("A T-shirt, (it’s) 3_4 Über!") == ["a", "t-shirt", "it's", "3", "4", "über"]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="not 1 for 2"):
        exact_match(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="Image 1 has no reference"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="two images or more"):
        cider(["a"], [["a"]])
    with pytest.raises(DataError, match="not 0 for 0"):
        exact_match([], [])
