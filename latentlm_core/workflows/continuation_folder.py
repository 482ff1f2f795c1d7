"""A folder of documents that a model went on with, and what stands beside them.

settings.json    what decides the documents: model, seed, samplers, prompts
000000.json      a document: its prompt, the pieces that were added, how it ended; written last
000000.png       its first image, and 000000-1.png, 000000-2.png, ... the others
samples.jsonl    a row for each document
grid.png         the first images together
"""

import json
from collections.abc import Sequence
from typing import Any

from latentlm_core.data.base import Image
from latentlm_core.data.media import image_grid, read_image, write_png
from latentlm_core.files import read_json, write_json, write_text
from latentlm_core.workflows.claimed_folder import ClaimedFolder

MAX_GRID = 256
"""Images that the grid shows at most."""


class ContinuationFolder(ClaimedFolder):
    """Documents of one model, seed and setting; of others it takes none."""

    suffix = ".json"
    others = (".png",)

    def add(
        self,
        index: int,
        prompt: str,
        pieces: Sequence[str | Image],
        ended_by: str,
        seed: int,
    ) -> None:
        """Write a document: its images, then itself."""
        shown: list[str | dict[str, str]] = []
        images: list[str] = []
        for piece in pieces:
            if isinstance(piece, str):
                shown.append(piece)
                continue
            name = f"{index:06d}{f'-{len(images)}' if images else ''}.png"
            write_png(self.path / name, piece)
            images.append(name)
            shown.append({"image": name})
        row = {
            "index": index,
            "file": images[0] if images else None,
            "prompt": prompt,
            "text": "\n".join(piece for piece in pieces if isinstance(piece, str)),
            "pieces": shown,
            "ended_by": ended_by,
            "seed": seed,
        }
        write_json(self.file(index), row)

    def rows(self) -> list[dict[str, Any]]:
        """All documents that are there, in their order."""
        return [read_json(path) for path in sorted(self.path.glob(f"[0-9]*[0-9]{self.suffix}"))]

    def finish(self) -> dict[str, str]:
        """Write ``samples.jsonl`` of all documents that are there, and the grid; where they are."""
        rows = self.rows()
        shared = {
            name: self.settings[name]
            for name in ("model_sha256", "data", "dtype", "sampler", "text_sampler")
        }
        lines = [json.dumps({**row, "class": None, **shared}) + "\n" for row in rows]
        write_text(self.path / "samples.jsonl", "".join(lines))
        shown = [piece["image"] for row in rows for piece in row["pieces"] if _is_image(piece)]
        if not shown:
            return {}
        images = [read_image(self.path / name, name) for name in shown[:MAX_GRID]]
        grid = self.path / "grid.png"
        write_png(grid, image_grid(images, max(1, round(len(images) ** 0.5))))
        return {"grid": str(grid)}


def _is_image(piece: Any) -> bool:
    return isinstance(piece, dict)
