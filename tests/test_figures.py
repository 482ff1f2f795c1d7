"""Figures and the report: what is on disk, that nothing escapes, and that text stays text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from latentlm_core.errors import ArtifactError
from latentlm_core.figures import (
    captioned_grid,
    class_grid,
    comparison_grid,
    loss_curves,
    quality_curves,
    sweep_curve,
)
from latentlm_core.report import Command, Picture, ReportPage, Section, Table, write_report

HOSTILE = "<script src='https://evil.example/x.js'>alert(\"1\")</script> & {braces} $x^2$"


def png_size(path: Path) -> tuple[int, int]:
    with PILImage.open(path) as image:
        image.verify()
        return image.size


def ink(path: Path, colour: tuple[int, int, int]) -> int:
    """How many pixels have just this colour."""
    with PILImage.open(path) as image:
        return int((np.asarray(image.convert("RGB")) == colour).all(-1).sum())


BLUE, VERMILLION = (0, 114, 178), (213, 94, 0)


def test_loss_curves_draw_training_and_validation_apart(tmp_path: Path) -> None:
    training = [{"step": step, "samples_seen": 9, "kl": 1.0 / step} for step in range(1, 9)]
    loss_curves(training, tmp_path / "training.png")
    loss_curves(
        [*training, {"step": 4, "validation/kl": 0.5}, {"step": 8, "validation/kl": 0.2}],
        tmp_path / "both.png",
    )
    assert ink(tmp_path / "training.png", BLUE) > 0
    assert ink(tmp_path / "training.png", VERMILLION) == 0
    assert ink(tmp_path / "both.png", VERMILLION) > 0


def test_loss_curves_have_a_panel_for_each_figure_and_skip_what_is_missing(tmp_path: Path) -> None:
    rows = [{"step": 1, "a": None, "loss/x": 1.0}, {"step": 2, "b": 0.1, "b/t0-9": -1}]
    loss_curves(rows, tmp_path / "two.png")
    loss_curves([{"step": 1, "a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}], tmp_path / "four.png")
    two, four = png_size(tmp_path / "two.png"), png_size(tmp_path / "four.png")
    assert two == (1200, 390)
    assert four == (1800, 780)


def test_loss_curves_of_an_empty_log(tmp_path: Path) -> None:
    loss_curves([], tmp_path / "curves.png")
    assert png_size(tmp_path / "curves.png")


def test_equal_figures_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        loss_curves([{"step": 1, "kl": 1.0}, {"step": 2, "kl": 0.5}], tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_sweep_has_a_line_for_each_number_of_steps(tmp_path: Path) -> None:
    rows = [
        {"guidance_scale": scale, "num_inference_steps": steps, "fid": scale + steps}
        for scale in (1.0, 2.0)
        for steps in (5, 20)
    ]
    sweep_curve(rows, tmp_path / "two.png")
    sweep_curve(rows[::2], tmp_path / "one.png", "fid[classifier-1]")
    assert ink(tmp_path / "two.png", VERMILLION) > 0
    assert ink(tmp_path / "one.png", VERMILLION) == 0


def test_quality_has_a_line_for_each_model(tmp_path: Path) -> None:
    lines = {"teacher": [(20, 1.0), (4, 3.0)], "student": [(4, 1.1), (1, 1.3)]}
    quality_curves(lines, "fid", tmp_path / "two.png")
    quality_curves({"teacher": lines["teacher"]}, "fid", tmp_path / "one.png")
    assert ink(tmp_path / "two.png", VERMILLION) > 0
    assert ink(tmp_path / "one.png", VERMILLION) == 0


def test_reconstructions_stand_under_their_originals(tmp_path: Path) -> None:
    white, black = torch.ones(3, 3, 32, 32), -torch.ones(3, 3, 32, 32)
    comparison_grid(white, 2 * black, tmp_path / "pairs.png")
    assert png_size(tmp_path / "pairs.png") == (3 * 66 + 2, 130 + 2)
    with PILImage.open(tmp_path / "pairs.png") as image:
        assert image.getpixel((10, 10)) == (255, 255, 255)
        assert image.getpixel((10, 120)) == (0, 0, 0)


def test_a_class_grid_has_a_row_for_each_class_whatever_its_name(tmp_path: Path) -> None:
    images = np.full((5, 8, 8, 3), (0, 114, 178), np.uint8)
    names = ("unused", "costs $5 or $6", "b")
    class_grid(images, [1, 1, 2, 1, 1], names, tmp_path / "both.png", columns=4)
    class_grid(images[:2], [1, 1], names, tmp_path / "one.png", columns=4)
    both, one = ink(tmp_path / "both.png", BLUE), ink(tmp_path / "one.png", BLUE)
    assert both == pytest.approx(2.5 * one, rel=0.05)


# The report


class Parser(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> ReportPage:
    comparison_grid(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), tmp_path / "pairs.png")
    return ReportPage(
        title=HOSTILE,
        lead=HOSTILE,
        figures={HOSTILE: 0.123456, "count": 1234567, "none": None, "word": HOSTILE, "large": 5e6},
        sections=[
            Section(
                HOSTILE,
                f"{HOSTILE}\n\nA second paragraph.",
                [
                    Picture(tmp_path / "pairs.png", HOSTILE, pixelated=True),
                    Table([HOSTILE, "value"], [[HOSTILE, 1.5], ["nan", float("nan")]], HOSTILE),
                    Command(HOSTILE),
                ],
            )
        ],
        details={"protocol": {"seed": 1}},
    )


def test_a_report_is_one_file_that_asks_for_nothing(page: ReportPage) -> None:
    parser = Parser()
    document = page.to_html()
    parser.feed(document)
    assert parser.sources
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)
    assert not {"script", "link", "iframe"} & set(parser.tags)
    assert "default-src 'none'" in document
    assert not re.search(r"url\(|@import", document)


def test_everything_in_a_report_is_escaped(page: ReportPage) -> None:
    parser = Parser()
    document = page.to_html()
    parser.feed(document)
    assert "<script" not in document
    assert parser.text.count("{braces}") == 12
    assert parser.tags.count("p") == 3


def test_numbers_are_rounded_for_people_and_kept_for_machines(page: ReportPage) -> None:
    document = page.to_html()
    assert "<dd>0.1235</dd>" in document
    assert "<dd>1,234,567</dd>" in document
    assert "<dd>5,000,000</dd>" in document
    assert page.to_dict()["figures"][HOSTILE] == 0.123456


def test_a_report_is_written_beside_its_json(page: ReportPage, tmp_path: Path) -> None:
    as_html, as_json = write_report(page, tmp_path / "new")
    assert as_html.read_text("utf-8").startswith("<!doctype html>")
    found = json.loads(as_json.read_text())
    assert found["format"] == "latentlm-report"
    assert found["details"] == {"protocol": {"seed": 1}}
    picture, table, command = found["sections"][0]["blocks"]
    assert picture["picture"] == "pairs.png"
    assert table["table"] == [[HOSTILE, 1.5], ["nan", None]]
    assert command["command"] == HOSTILE


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    page = ReportPage("t", "l", {}, [Section("s", "", [Picture(tmp_path / "no.png", "c")])])
    with pytest.raises(ArtifactError, match=r"no.png cannot be read"):
        page.to_html()


def test_captions_stand_below_their_images(tmp_path: Path) -> None:
    images = [np.full((8, 8, 3), BLUE, np.uint8)] * 3
    bare, told = tmp_path / "bare.png", tmp_path / "told.png"
    captioned_grid(images, ["", "", ""], bare, columns=2)
    captioned_grid(images, ["a red seven", "$x^2$ {b}", "word " * 40], told, columns=2)
    assert png_size(bare) == png_size(told)
    assert ink(told, BLUE) == pytest.approx(ink(bare, BLUE), rel=0.02)
    assert ink(told, (0, 0, 0)) > ink(bare, (0, 0, 0))
