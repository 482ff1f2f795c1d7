"""Targets that hold media: images, recordings."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile
from hypothesis import strategies as st

from latentlm_core.data.audio import read_audio
from latentlm_core.data.media import MAX_PIXELS, read_image
from tests.hostile import Target
from tests.hostile_changes import changed_bytes

SIDES = [
    0,
    1,
    2,
    16,
    100,
    9_999,
    10_000,
    16_383,
    65_535,
    65_536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
]


def make_images(_folder: Path) -> list[bytes]:
    """A small image in each format and mode that is read."""
    grey = (np.indices((12, 10)).sum(0) * 9 % 256).astype(np.uint8)
    base = PIL.Image.fromarray(grey)
    saved = [
        *((mode, "PNG", {}) for mode in ("L", "RGB", "RGBA", "P", "1", "I;16")),
        *((mode, "JPEG", {}) for mode in ("L", "RGB", "CMYK")),
        ("RGB", "JPEG", {"progressive": True, "exif": _exif()}),
        *(("RGBA", "WEBP", options) for options in ({}, {"lossless": True}, {"exif": _exif()})),
        ("P", "GIF", {"save_all": True, "append_images": [base.convert("P")] * 3}),
        *((mode, "BMP", {}) for mode in ("RGB", "P", "1")),
        *(
            ("RGB", "TIFF", {"compression": how})
            for how in (None, "tiff_lzw", "tiff_adobe_deflate")
        ),
        *((mode, "TIFF", {}) for mode in ("F", "I", "I;16", "CMYK", "LAB")),
        *((mode, "PPM", {}) for mode in ("RGB", "L", "1")),
    ]
    return [_encoded(base, *how) for how in saved]


def _exif() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    return exif.tobytes()


def _encoded(base: PIL.Image.Image, mode: str, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    if mode in ("F", "I", "I;16"):
        dtype = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
        image = PIL.Image.fromarray(np.asarray(base).astype(dtype))
    else:
        image = PIL.Image.new("LAB", base.size) if mode == "LAB" else base.convert(mode)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(
    width: int, height: int, depth: int, colour: int, chunks: list[tuple[bytes, bytes]]
) -> bytes:
    """A PNG with a header and chunks, whose check sums are right."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    blocks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)


sides = st.sampled_from(SIDES)
pixels = st.sampled_from([b"", b"x", zlib.compress(bytes(500)), zlib.compress(bytes(2_000_000))])
named = st.sampled_from(
    [b"IDAT", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"PLTE", b"tRNS", b"acTL"]
)
chunks = st.lists(st.tuples(named, pixels | st.binary(max_size=30)), max_size=4)
forged = st.one_of(
    st.builds(
        png,
        sides,
        sides,
        st.sampled_from([1, 8, 16, 3]),
        st.sampled_from([0, 2, 3, 4, 6, 7]),
        chunks,
    ),
    st.builds(
        lambda w, h, data: b"GIF89a" + struct.pack("<HHBBB", w % 65536, h % 65536, 0, 0, 0) + data,
        sides,
        sides,
        st.binary(max_size=60),
    ),
    st.builds(
        lambda w, h, data: b"P6\n%d %d\n255\n" % (w, h) + data, sides, sides, st.binary(max_size=60)
    ),
    st.builds(
        lambda w, h, bits, data: (
            b"BM"
            + struct.pack(
                "<IHHIIiiHHIIiiII",
                54,
                0,
                0,
                54,
                40,
                w % 2**31,
                h % 2**31,
                1,
                bits,
                0,
                0,
                0,
                0,
                0,
                0,
            )
            + data
        ),
        sides,
        sides,
        st.sampled_from([1, 8, 24, 32]),
        st.binary(max_size=60),
    ),
    st.builds(
        lambda w, h, data: (
            b"\xff\xd8\xff\xc0\x00\x11\x08"
            + struct.pack(">HHB", h % 65536, w % 65536, 3)
            + b"\x01\x11\x00\x02\x11\x01\x03\x11\x01"
            + data
        ),
        sides,
        sides,
        st.binary(max_size=60),
    ),
)


def use_image(_made: list[bytes], content: bytes, folder: Path) -> None:
    """From a file and from bytes; an image that is read has as many pixels as are allowed."""
    path = folder / "a.png"
    path.write_bytes(content)
    image = read_image(path, "a.png")
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert 0 < image.size <= 3 * MAX_PIXELS
    assert np.array_equal(image, read_image(content, "a.png"))


IMAGES = Target(
    "images",
    make_images,
    lambda made: made[0],
    lambda made: st.sampled_from(made).flatmap(lambda sound: changed_bytes(sound, 80)) | forged,
    use_image,
    mebibytes=512,
)


def make_audio(_folder: Path) -> list[bytes]:
    """A fifth of a second in each format that is read."""
    sound = 0.3 * np.sin(np.arange(1600) / 5).astype(np.float32)
    kinds = [
        *(("WAV", subtype) for subtype in ("PCM_16", "FLOAT", "ULAW", "IMA_ADPCM", "GSM610")),
        *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
        *(
            ("AIFF", "PCM_16"),
            ("AU", "PCM_16"),
            ("CAF", "PCM_16"),
            ("W64", "PCM_16"),
            ("RF64", "PCM_24"),
        ),
        *(
            ("VOC", "PCM_16"),
            ("SVX", "PCM_16"),
            ("PAF", "PCM_16"),
            ("WAVEX", "PCM_16"),
            ("CAF", "ALAC_16"),
        ),
    ]
    encoded = []
    for kind, subtype in kinds:
        buffer = io.BytesIO()
        soundfile.write(buffer, sound, 8000, format=kind, subtype=subtype)
        encoded.append(buffer.getvalue())
    return encoded


@st.composite
def wav(draw: st.DrawFn) -> bytes:
    """A wav whose header is made up."""
    big = st.sampled_from([0, 1, 2, 8, 16, 1024, 65_535, 8_000, 2**31, 2**32 - 1, 44_100])
    kind, channels, bits, block = (draw(big) % 65_536 for _ in range(4))
    rate, told, size = draw(big), draw(big), draw(big)
    fmt = struct.pack("<HHIIHH", kind, channels, rate, draw(big), block, bits)
    data = draw(st.binary(max_size=100))
    return (
        b"RIFF"
        + struct.pack("<I", told)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + fmt
        + b"data"
        + struct.pack("<I", size)
        + data
    )


@st.composite
def flac(draw: st.DrawFn, sound: bytes) -> bytes:
    """A flac whose header promises another rate, number of channels or length."""
    rate = draw(st.sampled_from([0, 1, 8_000, 655_350, 2**20 - 1]))
    total = draw(st.sampled_from([0, 1, 1600, 10**7, 99_000_000, 2**36 - 1]))
    word = rate << 44 | draw(st.integers(0, 7)) << 41 | draw(st.integers(3, 31)) << 36 | total
    return (
        sound[:18]
        + struct.pack(">Q", word)
        + draw(st.sampled_from([sound[26:], sound[26:60], b""]))
    )


def use_audio(_made: list[bytes], content: bytes, folder: Path) -> None:
    """From a file and from bytes."""
    path = folder / "a.wav"
    path.write_bytes(content)
    samples, rate = read_audio(path, "a.wav")
    assert samples.dtype == np.float32
    assert len(samples)
    assert np.abs(samples).max() <= 1
    assert np.array_equal(samples, read_audio(content, "a.wav")[0])
    assert 0 < rate < 10**6


AUDIO = Target(
    "audio",
    make_audio,
    lambda made: made[0],
    lambda made: st.one_of(
        st.sampled_from(made).flatmap(lambda sound: changed_bytes(sound, 100)), wav(), flac(made[5])
    ),
    use_audio,
)
