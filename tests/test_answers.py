"""Answers to questions by the rules of VQA."""

import pytest

from latentlm_core.errors import DataError
from latentlm_core.evaluation.answers import (
    CONTRACTIONS,
    normalise_answer,
    score_answers,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Two ", "2"),
        ("none", "0"),
        ("Ten men", "10 men"),
        ("eleven", "eleven"),
        ("The man on an island", "man on island"),
        ("a", ""),
        ("theatre", "theatre"),
        ("yes!", "yes"),
        ("yes, it is", "yes it is"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("well -known-fact", "well knownfact"),
        ("3,000", "3000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("3.5 m.", "3.5 m"),
        ("U.S.", "us"),
        ("5:30", "5:30"),
        ("dont", "don't"),
        ("Don’t", "don't"),
        ("isnt it", "isn't it"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("theyd've", "they'd've"),
        ("five oclock", "5 o'clock"),
        ("its", "its"),
        ("were well", "were well"),
        ("line\nbreak\ttab", "line break tab"),
    ],
)
def test_the_normal_form(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal
    assert normalise_answer(normal) == normal


def test_contractions_are_no_words_of_their_own() -> None:
    assert not {"were", "well", "wed", "shed", "shell", "hell", "ill", "id", "its"} & set(
        CONTRACTIONS
    )
    assert len(CONTRACTIONS) > 100
    assert all(word.replace("'", "") == key.replace("'", "") for key, word in CONTRACTIONS.items())


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_ten_people_in_closed_form(matches: int, accuracy: float) -> None:
    """Of ten sets of nine people, ``matches`` hold one match less than there are."""
    answers = ["Yes"] * matches + [f"no {number}" for number in range(10 - matches)]
    assert vqa_accuracy("yes.", answers) == pytest.approx(accuracy)


def test_the_mean_over_questions() -> None:
    scores = score_answers(["2", "red"], [["two"] * 9 + ["3"], ["a red"] * 2 + ["blue"] * 8])
    assert scores.metric == "vqa_accuracy"
    assert scores.each == pytest.approx((1.0, 0.6))
    assert scores.accuracy == pytest.approx(0.8)


def test_one_answer_is_matched() -> None:
    scores = score_answers(["Seven", "7", "8"], [["seven"], ["seven"], ["seven"]])
    assert (scores.metric, scores.each) == ("match_accuracy", (1.0, 1.0, 0.0))


def test_what_cannot_be_rated_is_refused() -> None:
    with pytest.raises(DataError, match="not 1 to 2"):
        score_answers(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="not 0 to 0"):
        score_answers([], [])
    with pytest.raises(DataError, match="4 people or more to a question, not 1"):
        score_answers(["a", "b"], [["a"] * 10, ["b"]])
    with pytest.raises(DataError, match="not 3"):
        vqa_accuracy("a", ["a"] * 3)
