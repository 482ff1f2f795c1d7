"""Strategies that spoil sound bytes, JSON values and names."""

import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from latentlm_core.config import digest_of
from latentlm_core.files import SEAL

INTEGERS = (-(2**63), -1, 0, 1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 2**64)
"""Sizes and places at which arithmetic goes wrong."""

NAMES = (
    *("", " ", ".", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "~", "~root/x"),
    *("a/../../victim.txt", "./a", "a//b", "a/", "a.", "a ", "...", "-", "--out", "-h", "a\\b"),
    *("con", "nul.txt", "C:\\x", "\\\\host\\share", "file:///etc/passwd", "http://localhost:1/x"),
    *("a\x00b", "\x00", "a\nb", "a\rb", "a\tb", "\x1b[31mred", "\x7f", "\u202egnp.exe", "\u200b"),
    *(
        "\ud800",
        "a\udcffb",
        "\ufeff",
        "e\u0301",
        "\u00e9",
        "\U0001f600",
        "\U0001f468\u200d\U0001f469",
    ),
    *("x" * 255, "x" * 256, "x" * 5000, "y/" * 500, "%s%n", "{0}", "${HOME}", "`id`", "; rm -rf /"),
    *("hf:", "hf:a", "hf:a/b", "hf:a/b:c", "hf:../..", "folder:", "folder:.", "embedded:shapes"),
    *("text:", "text:pydoc", "pairs:", "interleaved:x", "stream:hf:a/b", "stream:.", "=1", "a=nan"),
    *("nan", "inf", "-1", "1e400", "9" * 400, "٣", "0x10", "1_000", "null", "true", "[]", "{}"),
)
"""Names that mean something else somewhere."""

FAULTS = ("flip", "set", "word", "cut", "insert", "repeat", "zero")
CHANGES = ("set", "set", "set", "remove", "rename", "nudge", "nudge")

names = st.sampled_from(NAMES) | st.text(max_size=12)

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((*INTEGERS, 10**30)),
    st.integers(-3, 100),
    st.floats(),
    names,
    st.just("f" * 64),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed_bytes(draw: st.DrawFn, sound: bytes, region: int | None = None) -> bytes:
    """Some bytes with one to three faults, most of them among the first ``region``."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        end = max(len(content) - 1, 0)
        near = min(end, region) if region and draw(st.integers(0, 4)) else end
        place = draw(st.integers(0, near))
        match draw(st.sampled_from(FAULTS)):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "set" if content:
                content[place] = draw(st.integers(0, 255))
            case "word" if content:
                value = draw(st.sampled_from(INTEGERS)) % 2**64
                order, letter = draw(st.sampled_from("<>")), draw(st.sampled_from("HIQ"))
                word = struct.pack(order + letter, value % 2 ** (8 * struct.calcsize(letter)))
                content[place : place + len(word)] = word
            case "cut":
                del content[place:]
            case "insert":
                content[place:place] = draw(st.binary(max_size=20))
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 64))]
            case "zero" if content:
                length = min(draw(st.integers(1, 64)), len(content) - place)
                content[place : place + length] = bytes(length)
    return bytes(content)


def places_of(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value but its top."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    found = []
    for key in keys:
        found += [(*before, key), *places_of(value[key], (*before, key))]
    return found


@st.composite
def changed_json(draw: st.DrawFn, sound: Any, inner: st.SearchStrategy[Any] = values) -> Any:
    """A JSON value with one to three places changed, removed or renamed."""
    value = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        places = places_of(value)
        if not places:
            return draw(inner)
        *path, key = draw(st.sampled_from(places))
        node = value
        for step in path:
            node = node[step]
        match draw(st.sampled_from(CHANGES)):
            case "set":
                node[key] = draw(inner)
            case "remove":
                del node[key]
            case "rename" if isinstance(node, dict):
                node[draw(names)] = node.pop(key)
            case "nudge" if isinstance(node[key], int | float):
                node[key] = draw(st.sampled_from([-1, 2, 1024, 10**6])) * node[key]
    return value


@st.composite
def changed_json_bytes(draw: st.DrawFn, sound: Any) -> bytes:
    """The file of a JSON value: changed, or damaged, or something else."""
    match draw(st.integers(0, 9)):
        case 0:
            return draw(changed_bytes(json.dumps(sound, indent=2).encode()))
        case 1:
            return draw(odd_json)
        case _:
            text = json.dumps(draw(changed_json(sound)))
            return text.encode("utf-8", "replace")


def sealed(value: Any) -> bytes:
    """The file of a JSON value, with a seal that vouches for it where it is an object."""
    if isinstance(value, dict):
        value = value | {SEAL: digest_of(value)}
    return json.dumps(value).encode("utf-8", "replace")


odd_json = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            *(b"", b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"[" * 100_000, b'{"a":' * 50_000),
            *(
                b"\xef\xbb\xbf{}",
                b"\xff\xfe{\x00}\x00",
                b'"\\ud800"',
                b"1" * 10_000,
                b"-" + b"9" * 5000,
            ),
            *(b'{"a": 1, "a": 2}', b"{} {}", b"1e999", b'"\\u0000"', b"\x00" * 100),
        ]
    ),
    values.map(lambda value: json.dumps(value).encode("utf-8", "replace")),
)
"""Bytes where an object was expected."""


def lines_of(rows: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """A file with a JSON value a line, some of them changed."""
    sound = [json.dumps(row).encode() for row in rows]
    line = st.one_of(
        st.sampled_from(sound),
        changed_json(rows[0]).map(lambda value: json.dumps(value).encode("utf-8", "replace")),
        odd_json.filter(lambda content: len(content) < 1000),
    )
    ends = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"])
    joined = st.builds(lambda parts, end: end.join(parts), st.lists(line, max_size=6), ends)
    return joined | changed_bytes(b"\n".join(sound) + b"\n")
