"""Pictures of a run: curves, reconstructions beside originals, samples by class, spectrograms.

Figures are made without pyplot, so nothing global changes and any thread may draw. Colours are
those of Okabe and Ito, which stay apart for colour-blind eyes; validation is told from training by
its line as well as by its colour.

Axes: B images, H W image, S audio samples.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from latentlm_core.data.base import Image
from latentlm_core.data.media import image_grid, paired_grid, to_images, write_png
from latentlm_core.files import write_bytes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHOWN_SIDE = 64
"""Images are enlarged by whole factors until they are about this large."""

CAPTION_WIDTH, CAPTION_LINES = 22, 3
"""Of a caption below an image, in characters and lines."""

_NOT_DRAWN = frozenset(
    {
        "step",
        "samples_seen",
        "samples_per_second",
        "tokens_per_second",
        "flops_utilisation",
        "data_wait_share",
    }
)
_INK, _FAINT = "#333333", "#d0d0d0"


def loss_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rows of a ``metrics.jsonl``, one panel a figure, validation with its training.

    Args:
        rows: as logged: ``step``, then figures; ``a/b`` is line ``b`` of panel ``a``.
        path: the PNG to write.
    """
    panels = _panels(rows)
    num_columns = min(3, max(1, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = _figure(4.0 * num_columns, 2.6 * num_rows)
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        _draw_panel(axes, title, lines)
    _save(figure, path)


def sweep_curve(rows: Sequence[Mapping[str, float]], path: Path, metric: str = "fid") -> None:
    """Draw a distance over guidance scales, one line a number of steps, the least one marked.

    Args:
        rows: each with ``guidance_scale``, ``num_inference_steps`` and ``fid``.
        path: the PNG to write.
        metric: name of the distance.
    """
    figure = _figure(5.2, 3.4)
    axes = figure.add_subplot()
    for place, steps in enumerate(sorted({row["num_inference_steps"] for row in rows})):
        line = sorted(
            (row["guidance_scale"], row["fid"])
            for row in rows
            if row["num_inference_steps"] == steps
        )
        axes.plot(
            *zip(*line, strict=True), "o-", ms=4, color=_colour(place), label=f"{steps} steps"
        )
    best = min(rows, key=lambda row: row["fid"])
    axes.plot(best["guidance_scale"], best["fid"], "o", ms=11, mfc="none", color=_INK)
    axes.annotate(
        f"{best['fid']:.4g} at {best['guidance_scale']:g}",
        (best["guidance_scale"], best["fid"]),
        xytext=(0, 12),
        textcoords="offset points",
        ha="center",
    )
    axes.margins(y=0.2)
    axes.set_xlabel("guidance scale")
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    _tidy(axes)
    _save(figure, path)


def quality_curves(
    lines: Mapping[str, Sequence[tuple[int, float]]], metric: str, path: Path
) -> None:
    """Draw a distance over numbers of solver steps.

    Args:
        lines: (steps, distance) of each model.
        metric: name of the distance.
        path: the PNG to write.
    """
    figure = _figure(5.2, 3.4)
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), "o-", ms=4, color=_colour(place), label=name)
    steps = sorted({number for points in lines.values() for number, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(number) for number in steps])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps a latent")
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    _tidy(axes)
    _save(figure, path)


def comparison_grid(originals: Tensor, reconstructions: Tensor, path: Path) -> None:
    """Write reconstructions, each under its original.

    Args:
        originals: media (B, 3, H, W) in [-1, 1].
        reconstructions: of the same shape, not necessarily clamped.
        path: the PNG to write.
    """
    above, below = _enlarge(to_images(originals)), _enlarge(to_images(reconstructions))
    write_png(path, paired_grid(above, below, columns=16))


def class_grid(
    images: Image, labels: Sequence[int], classes: Sequence[str], path: Path, columns: int = 10
) -> None:
    """Draw samples, a row for each class that occurs, with its name.

    Args:
        images: uint8 (B, H, W, 3).
        labels: class of each, an index into ``classes``.
        classes: their names.
        path: the PNG to write.
        columns: samples shown of a class.
    """
    shown = sorted(set(labels))
    blank = np.full_like(images[0], 255)
    cells: list[Image] = []
    for label in shown:
        row = [image for image, each in zip(images, labels, strict=True) if each == label]
        cells += (row + [blank] * columns)[:columns]
    grid = image_grid(_enlarge(np.stack(cells)), columns)
    height, width = grid.shape[:2]
    inches = 7.5 / width
    figure = _figure(7.5 + 1.2, height * inches + 0.2)
    axes = figure.add_subplot()
    axes.imshow(grid, interpolation="nearest")
    axes.set_xticks([])
    places = (np.arange(len(shown)) + 0.5) * height / len(shown)
    for text in axes.set_yticks(places, [classes[label] for label in shown]):
        text.label1.set_parse_math(False)
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def captioned_grid(
    images: Sequence[Image], captions: Sequence[str], path: Path, columns: int = 6
) -> None:
    """Draw images, each over its text.

    Args:
        images: uint8 (H, W, 3) each.
        captions: as many; broken into lines where they are long.
        path: the PNG to write.
        columns: images in a row.
    """
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    figure = _figure(1.6 * columns, 2.1 * lines)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        text = "\n".join(textwrap.wrap(caption, CAPTION_WIDTH)[:CAPTION_LINES])
        below = {"x": 0.5, "y": -0.04, "ha": "center", "va": "top", "transform": axes.transAxes}
        axes.text(s=text, fontsize=7, parse_math=False, **below)
    _save(figure, path)


def spectrogram_pairs(
    originals: Sequence[Tensor],
    rebuilt: Sequence[Tensor],
    sample_rate: int,
    titles: Sequence[str],
    path: Path,
) -> None:
    """Draw recordings, each over its reconstruction.

    Args:
        originals: audio (S,) each.
        rebuilt: as many.
        sample_rate: in Hz.
        titles: of each pair.
        path: the PNG to write.
    """
    pairs = zip(originals, rebuilt, strict=True)
    _spectrograms([list(pair) for pair in pairs], sample_rate, titles, path)


def spectrograms(
    audio: Sequence[Tensor], sample_rate: int, titles: Sequence[str], path: Path
) -> None:
    """Draw recordings (S,) side by side; arguments as in ``spectrogram_pairs``."""
    _spectrograms([[one] for one in audio], sample_rate, titles, path)


def _spectrograms(
    groups: Sequence[Sequence[Tensor]], sample_rate: int, titles: Sequence[str], path: Path
) -> None:
    """A place for each group, whose members stand one below the other."""
    depth, columns = len(groups[0]), min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = _figure(3.6 * columns, 1.5 * lines * depth + 0.3)
    for number, (members, title) in enumerate(zip(groups, titles, strict=True)):
        line, column = divmod(number, columns)
        for level, samples in enumerate(members):
            place = (line * depth + level) * columns + column + 1
            axes = figure.add_subplot(lines * depth, columns, place)
            with np.errstate(divide="ignore"):  # digital silence has no level
                axes.specgram(
                    samples.float().numpy(),
                    NFFT=_WINDOW_MS * sample_rate // 1000,
                    Fs=sample_rate,
                    noverlap=_WINDOW_MS * sample_rate // 1250,
                    cmap="magma",
                    vmin=-110,
                    vmax=-30,
                )
            axes.tick_params(labelsize=6, length=0)
            if level == 0:
                shown = title[:48].encode("utf-8", "replace").decode()  # no lone surrogates
                axes.set_title(shown, fontsize=8, loc="left", color=_INK, parse_math=False)
    _save(figure, path)


_WINDOW_MS = 32


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{panel: {line: [(step, value)]}}, in the order in which the figures turn up."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name in _NOT_DRAWN or not isinstance(value, int | float):
                continue
            plain = name.removeprefix("validation/")
            panel, _, part = plain.partition("/")
            kind = "training" if plain == name else "validation"
            line = f"{kind} {part}".strip()
            panels.setdefault(panel, {}).setdefault(line, []).append((row["step"], value))
    return panels


def _draw_panel(axes: Any, title: str, lines: Mapping[str, list[tuple[int, float]]]) -> None:
    for place, (label, points) in enumerate(lines.items()):
        style = "o--" if label.startswith("validation") else "-"
        axes.plot(
            *zip(*points, strict=True), style, ms=3, lw=1.3, color=_colour(place), label=label
        )
    values = [value for points in lines.values() for _, value in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_title(title.replace("_", " "), fontsize=10, loc="left", color=_INK)
    axes.set_xlabel("step", fontsize=8)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=7)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.grid(axis="y", color=_FAINT, lw=0.5)
    axes.tick_params(which="both", labelsize=8, color=_FAINT, labelcolor=_INK)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _enlarge(images: Image) -> Image:
    """Repeat the pixels of images (B, H, W, 3) until they can be seen."""
    factor = max(1, SHOWN_SIDE // max(images.shape[1:3]))
    enlarged: Image = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return enlarged


def _figure(width: float, height: float) -> Any:
    """An empty figure of ``width`` x ``height`` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
