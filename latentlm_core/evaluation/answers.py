"""How often answers to questions about images are right, by the rules of VQA.

Notable choices:
- Two accuracies that are not the same number. ``vqa_accuracy`` is that of Antol et al. (2015) for
  many human answers: an answer is worth a third for each person who gave it, up to 1, averaged
  over the sets that leave one person out. ``match_accuracy`` is plain equality, where one answer is
  known. A report names the one that it used.
- Answers are compared in the published normal form, whose rules for punctuation look at the whole
  answer: a mark that stands next to a space is dropped everywhere, another becomes a space, and
  an answer with a number like 3,000 in it loses all its marks. Both sides go through it always; the
  published script skips it where all people agree.

Axes: N questions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from latentlm_core.errors import DataError

ENOUGH_PEOPLE = 3
"""An answer that so many of the other people gave is right."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = frozenset(("a", "an", "the"))
MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation besides the full stop, the colon and the apostrophe, which stay."""


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """How right the answers to N questions are.

    Attributes:
        metric: `vqa_accuracy` or `match_accuracy`, see this module's text.
        each: of each answer, 0 to 1.
    """

    metric: str
    each: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """The mean, 0 to 1."""
        return sum(self.each) / len(self.each)


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> AnswerScores:
    """Compare answers with what people answered.

    Args:
        predictions: N answers.
        answers: to each question one answer, or to each those of many people (VQA: ten).

    Raises:
        DataError: no questions, another number of them, or questions with one answer beside some
            with many, or with two or three, which the published accuracy cannot rate.
    """
    if not predictions or len(predictions) != len(answers):
        raise DataError(
            f"There must be an answer to each question, not {len(predictions)} to {len(answers)}."
        )
    if all(len(known) == 1 for known in answers):
        pairs = zip(predictions, answers, strict=True)
        each = tuple(float(is_match(prediction, known[0])) for prediction, known in pairs)
        return AnswerScores("match_accuracy", each)
    return AnswerScores("vqa_accuracy", tuple(map(vqa_accuracy, predictions, answers)))


def is_match(prediction: str, answer: str) -> bool:
    """Whether two answers are equal in the normal form."""
    return normalise_answer(prediction) == normalise_answer(answer)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(matches / 3, 1), the mean over the sets of answers that leave one person out.

    Raises:
        DataError: so few people answered that no answer could be right.
    """
    if len(answers) <= ENOUGH_PEOPLE:
        raise DataError(
            f"The VQA accuracy needs the answers of {ENOUGH_PEOPLE + 1} people or more to a "
            f"question, not {len(answers)}; where one answer is known, all must have one."
        )
    matches = [is_match(prediction, answer) for answer in answers]
    others = (sum(matches) - own for own in matches)
    return sum(min(count / ENOUGH_PEOPLE, 1.0) for count in others) / len(answers)


def normalise_answer(text: str) -> str:
    """The normal form of an answer.

    Lower case, punctuation removed, zero to ten (and none) as digits, no articles, apostrophes put
    back into contractions, single spaces.
    """
    plain = " ".join(text.lower().replace("’", "'").split())
    has_thousands = _THOUSANDS.search(plain) is not None
    cleaned = plain
    for mark in MARKS:
        is_apart = has_thousands or f"{mark} " in plain or f" {mark}" in plain
        cleaned = cleaned.replace(mark, "" if is_apart else " ")
    counted = (_FIGURES.get(word, word) for word in _FULL_STOP.sub("", cleaned).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in counted if word not in ARTICLES)


def _contractions() -> dict[str, str]:
    """Contractions without one of their apostrophes, or all of them => as they are spelled."""
    spelled = {}
    for ending, stems in _CONTRACTED.items():
        for stem in stems.split():
            first, *rest = f"{stem}{ending}".split("'")
            spelled["".join((first, *rest))] = f"{stem}{ending}"
            if len(rest) == 2:
                spelled[f"{first}'{rest[0]}{rest[1]}"] = f"{stem}{ending}"
                spelled[f"{first}{rest[0]}'{rest[1]}"] = f"{stem}{ending}"
    return spelled


_CONTRACTED = {
    "n't": "ai are ca could did do does had has have is might must need should was were wo would",
    "n't've": "could had might must should would",
    "'ve": "could i might must should they we what where who would you",
    "'d": "he how it that there they where who you",
    "'d've": "he i it she that there they we who you",
    "'ll": "how it that they what who why you",
    "'re": "there they what why you",
    "'s": "he how she that there what when where who why",
    "": "i'm let's ma'am o'clock 'twas y'all",
}
CONTRACTIONS = _contractions()
"""Only what is no other word without its apostrophe: "were" and "its" stay."""

_FIGURES = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
_THOUSANDS = re.compile(r"[0-9],[0-9]")
_FULL_STOP = re.compile(r"\.(?![0-9])")
