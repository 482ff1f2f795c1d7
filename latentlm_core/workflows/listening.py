"""A page to listen to: the samples that were understood worst, and the first ones.

Every sample has its spectrogram, a player, its text and what the recogniser wrote.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from latentlm_core.data.audio import read_audio
from latentlm_core.evaluation.speech import WerReport, WerRow
from latentlm_core.figures import spectrograms
from latentlm_core.report import Block, Picture, ReportPage, Section, Sound, Table, write_report

NUM_WORST, NUM_FIRST = 6, 6


def listening_page(report: WerReport, folder: Path) -> Path:
    """Write the page of a WER report.

    Args:
        report: whose rows name the files.
        folder: where ``report.html`` goes.

    Returns:
        the page.
    """
    worst = sorted((row for row in report.rows if row.errors), key=lambda row: -row.errors)
    sections = [_section("The first samples", report.rows[:NUM_FIRST], folder / "first.png")]
    if worst:
        sections.append(
            _section("The samples with most errors", worst[:NUM_WORST], folder / "worst.png")
        )
    protocol = report.protocol
    about = Table(
        ("", ""),
        [
            ("recogniser", protocol.recogniser),
            ("normaliser", protocol.normaliser),
            ("samples", protocol.num_samples),
            ("samples' sha256", protocol.samples_sha256),
        ],
        "How it was measured",
    )
    page = ReportPage(
        title="What a recogniser understood",
        lead=(
            f"{protocol.num_samples} samples of speech, written down by {protocol.recogniser} and "
            "compared with their texts."
        ),
        figures=dict(report.values),
        sections=[*sections, Section("Protocol", "", [about])],
        details=report.to_dict(),
    )
    return write_report(page, folder)[0]


def _section(title: str, rows: Sequence[WerRow], picture: Path) -> Section:
    audio = [read_audio(Path(row.file), row.file) for row in rows]
    sample_rate = audio[0][1]
    spectrograms(
        [torch.from_numpy(samples) for samples, _ in audio],
        sample_rate,
        [row.text for row in rows],
        picture,
    )
    blocks: list[Block] = [Picture(picture, "Spectrograms, in this order")]
    for row in rows:
        understood = row.transcript or "(nothing)"
        blocks.append(Sound(Path(row.file), f"{row.text}   =>   {understood}"))
    return Section(title, "", blocks)
