"""A report that a person enjoys and a machine can read: ``report.html`` and ``report.json``.

The page is one file: styles inline, pictures and sounds as data. Its content policy forbids every
request, so it looks the same from a mail, a USB stick or a web server. All text is escaped; nothing
in it is markup.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentlm_core.errors import ArtifactError
from latentlm_core.files import write_json, write_text

REPORT_FORMAT = "latentlm-report"
REPORT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file.

    Attributes:
        path: the file; its bytes go into the page.
        caption: what it shows; also its description for those who do not see it.
        pixelated: enlarge it without smoothing.
    """

    path: Path
    caption: str
    pixelated: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; numbers are rounded for the page only.

    Attributes:
        header: names of the columns.
        rows: cells, as many as the header has.
        caption: what it shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """Shell lines that repeat something.

    Attributes:
        text: the lines.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Sound:
    """A WAV file that can be played in the page.

    Attributes:
        path: the file; its bytes go into the page.
        caption: what is heard.
    """

    path: Path
    caption: str


Block = Picture | Table | Command | Sound


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: paragraphs, parted by empty lines.
        blocks: what follows the text.
    """

    title: str
    text: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True, slots=True)
class ReportPage:
    """A whole report.

    Attributes:
        title: its heading.
        lead: one or two sentences under it.
        figures: the few numbers that matter most, by name, in order.
        sections: the body.
        details: everything else that a machine may want: protocols, configuration, versions.
    """

    title: str
    lead: str
    figures: Mapping[str, Any]
    sections: Sequence[Section]
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; pictures by the names of their files, null for what is not finite."""
        record = {
            "format": REPORT_FORMAT,
            "format_version": REPORT_VERSION,
            "title": self.title,
            "lead": self.lead,
            "figures": dict(self.figures),
            "sections": [
                {
                    "title": section.title,
                    "text": section.text,
                    "blocks": [_block_record(block) for block in section.blocks],
                }
                for section in self.sections
            ],
            "details": dict(self.details),
        }
        as_json: dict[str, Any] = finite(record)
        return as_json

    def to_html(self) -> str:
        """The page as one self-contained document.

        Raises:
            ArtifactError: a picture cannot be read.
        """
        figures = "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_cell(value)}</dd></div>"
            for name, value in self.figures.items()
        )
        return _PAGE.format(
            title=_text(self.title),
            lead=_text(self.lead),
            figures=f"<dl>{figures}</dl>" if figures else "",
            sections="".join(_section_html(section) for section in self.sections),
            style=_STYLE,
        )


def write_report(page: ReportPage, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json``, each atomically.

    Returns:
        Their paths.

    Raises:
        ArtifactError: a picture cannot be read, or the folder not written.
    """
    as_html, as_json = folder / "report.html", folder / "report.json"
    write_text(as_html, page.to_html())
    write_json(as_json, page.to_dict())
    return as_html, as_json


def finite(value: Any) -> Any:
    """The same JSON value with null for infinities and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _block_record(block: Block) -> dict[str, Any]:
    match block:
        case Picture():
            return {"picture": block.path.name, "caption": block.caption}
        case Table():
            rows = [list(row) for row in block.rows]
            return {"table": rows, "header": list(block.header), "caption": block.caption}
        case Command():
            return {"command": block.text}
        case Sound():
            return {"sound": block.path.name, "caption": block.caption}


def _section_html(section: Section) -> str:
    paragraphs = (part for part in section.text.split("\n\n") if part.strip())
    text = "".join(f"<p>{_text(part)}</p>" for part in paragraphs)
    blocks = "".join(_block_html(block) for block in section.blocks)
    return f"<section><h2>{_text(section.title)}</h2>{text}{blocks}</section>"


def _block_html(block: Block) -> str:
    match block:
        case Picture():
            data = base64.b64encode(_read(block.path)).decode()
            look = ' class="pixelated"' if block.pixelated else ""
            caption = _text(block.caption)
            return (
                f'<figure><img{look} src="data:image/png;base64,{data}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        case Table():
            return _table_html(block)
        case Command():
            return f"<pre><code>{_text(block.text)}</code></pre>"
        case Sound():
            data = base64.b64encode(_read(block.path)).decode()
            return (
                f"<figure><figcaption>{_text(block.caption)}</figcaption>"
                f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>'
                "</figure>"
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from None


def _table_html(table: Table) -> str:
    header = "".join(f"<th>{_text(name)}</th>" for name in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td{_align(cell)}>{_cell(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{header}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _align(cell: Any) -> str:
    return ' class="number"' if isinstance(cell, int | float) else ""


def _cell(value: Any) -> str:
    """A value for the page: numbers with thousands or four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text("–" if value is None else str(value))
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


_STYLE = """
:root { color-scheme: light dark; --paper: #fdfcfa; --ink: #1f2328; --soft: #6a7078;
  --line: #e4e1da; --card: #f5f3ee; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e6e4df; --soft: #9aa0a8;
  --line: #2e3238; --card: #1e2125; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.6;
  font: 17px/1.6 "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif; }
main { max-width: 52rem; margin: 0 auto; padding: 4rem 1.5rem 6rem; }
h1, h2, dt, th, caption, figcaption {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 2.4rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 0.6rem; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3.2rem 0 0.6rem; }
p { margin: 0.6rem 0; white-space: pre-line; overflow-wrap: anywhere; }
.lead { font-size: 1.2rem; color: var(--soft); margin: 0 0 2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: 0.8rem;
  margin: 2rem 0; }
dl div { background: var(--card); border-radius: 10px; padding: 0.9rem 1.1rem; }
dt { font-size: 0.8rem; color: var(--soft); overflow-wrap: anywhere; }
dd { margin: 0.1rem 0 0; font-size: 1.45rem; font-variant-numeric: tabular-nums lining-nums;
  overflow-wrap: anywhere; line-height: 1.3; }
figure { margin: 1.4rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 8px; background: #fff; }
audio { width: 100%; margin-top: 0.3rem; }
img.pixelated { image-rendering: pixelated; width: 100%; }
figcaption, caption { font-size: 0.85rem; color: var(--soft); margin-top: 0.5rem;
  text-align: left; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.95rem; }
caption { margin-bottom: 0.4rem; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-size: 0.8rem; font-weight: 600; color: var(--soft); }
.number { font-variant-numeric: tabular-nums lining-nums; }
pre { background: var(--card); border-left: 3px solid var(--accent); border-radius: 0 8px 8px 0;
  padding: 0.9rem 1.1rem; overflow-x: auto; font-size: 0.85rem; line-height: 1.5; }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --card: #f4f4f4; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  h2 { break-after: avoid; } figure, tr, dl div { break-inside: avoid; }
  pre { white-space: pre-wrap; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p class="lead">{lead}</p></header>
{figures}
{sections}
</main>
</body>
</html>
"""
