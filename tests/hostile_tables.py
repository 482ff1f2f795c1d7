"""The target of parquet files, as folders of images, recordings and documents have them."""

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from latentlm_core.data.audio import write_wav
from latentlm_core.data.media import write_png
from latentlm_core.data.sources import open_source
from latentlm_core.data.speech_sources import open_speech
from latentlm_core.data.texts import open_endless_texts, open_texts
from tests.hostile import Target, in_turn
from tests.hostile_changes import NAMES, changed_bytes, changed_json

READERS = {"image": open_source, "audio": open_speech}


def make_tables(folder: Path) -> dict[str, list[bytes]]:
    """Cells of a column of media, by its name."""
    write_png(folder / "a.png", np.zeros((2, 2, 3), np.uint8))
    write_wav(folder / "a.wav", np.zeros(800, np.float32), 8000)
    return {"image": [(folder / "a.png").read_bytes()], "audio": [(folder / "a.wav").read_bytes()]}


def typed(columns: dict[str, list[object]]) -> Any:
    """A table whose media are bytes or paths."""
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table(
        {
            name: pa.array(cells, cell if name in READERS else None)
            for name, cells in columns.items()
        }
    )


def described(columns: dict[str, list[object]]) -> dict[str, Any]:
    """What the `datasets` library writes beside columns of which one holds media."""
    features = datasets.Features.from_arrow_schema(typed(columns).schema).to_dict()
    media = {"image": {"_type": "Image"}, "audio": {"_type": "Audio"}}
    return {"info": {"features": features | {key: media[key] for key in media.keys() & columns}}}


def encoded(columns: dict[str, list[object]], description: Any) -> bytes:
    """A parquet file."""
    buffer = io.BytesIO()
    table = typed(columns).replace_schema_metadata({"huggingface": json.dumps(description)})
    pq.write_table(table, buffer)
    return buffer.getvalue()


@st.composite
def tables(draw: st.DrawFn, made: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """The kind of a table, and its file: with odd cells, or damaged bytes."""
    kind = draw(st.sampled_from(["image", "audio", "text"]))
    texts = draw(
        st.lists(st.sampled_from([n for n in NAMES if n.isascii()]), min_size=2, max_size=2)
    )
    if draw(st.booleans()):
        cells = [
            {"bytes": draw(st.none() | st.sampled_from(made.get(kind, [b"x"]))), "path": path}
            for path in texts
        ]
    else:
        cells = [{"bytes": made.get(kind, [b"x"])[0], "path": None}] * 2
    columns: dict[str, list[object]] = {
        kind: texts if kind == "text" else cells,
        draw(st.sampled_from(["label", "speaker", "text", "caption", "questions"])): draw(
            st.sampled_from(
                [
                    [0, 1],
                    [-1, None],
                    [2**40, 0],
                    texts,
                    [[t] for t in texts],
                    [None, None],
                    [0.5, 1.0],
                ]
            )
        ),
    }
    description = described(columns)
    if draw(st.integers(0, 3)) == 0:
        description = draw(changed_json(description))
    content = encoded(columns, description)
    return kind, draw(changed_bytes(content)) if draw(st.integers(0, 2)) else content


def use_table(_made: object, case: tuple[str, bytes], folder: Path) -> None:
    """A folder with one such file; the library's own cache is inside the case's folder."""
    kind, content = case
    (folder / "set").mkdir()
    (folder / "set" / "train.parquet").write_bytes(content)
    spec = str(folder / "set")
    with mock.patch("datasets.config.HF_DATASETS_CACHE", folder / "cache"):
        if kind == "text":
            in_turn([lambda: list(open_texts(spec)), lambda: open_endless_texts(spec, 0, 0.1)[3]])
        else:
            source = READERS[kind](spec)
            in_turn([lambda i=i: source[i] for i in range(min(len(source), 3))])


def sound_table(made: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """Two images with labels."""
    cells: list[object] = [{"bytes": made["image"][0], "path": None}] * 2
    columns: dict[str, list[object]] = {"image": cells, "label": [0, 1]}
    return "image", encoded(columns, described(columns))


PARQUET = Target("parquet", make_tables, sound_table, tables, use_table, 4096)
"""Arrow believes the header of a page, which can say 2 GiB at most."""
