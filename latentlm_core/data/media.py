"""Images between files, bytes, arrays and tensors.

Notable choices:
    an image is what a viewer shows: EXIF orientation is applied, transparency lies on white,
    the first frame of an animation counts; 16-bit grey is scaled to 8 bits;
    the size is checked in the header, before a pixel is decoded;
    a file is read as a whole, since decoders ask files, not bytes, for all that a header says;
    only raster formats without a script or an outside program behind them are opened;
    Pillow's warnings (of sizes, of EXIF, of palettes) are off once an image has been read: images
    are read in threads, and these share the filters of warnings.

Axes: B images, H W image.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from latentlm_core import files
from latentlm_core.data.base import Image, whole_file
from latentlm_core.errors import CorruptFileError, DataError

MAX_PIXELS = 100_000_000
"""Larger images are refused: decoded, this is 300 MB."""
MAX_PIXELS_PER_BYTE = 10_000
"""Of a file at most; photographs have up to 200, white PNGs 1,000. A header alone takes no memory
beyond ``ALWAYS_PIXELS``."""
ALWAYS_PIXELS = 4_000_000
"""Pixels that are allowed however small the file."""
MAX_ASPECT = 64
"""Images that are this many times longer than wide are refused: a crop would first enlarge them."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
"""File names that are taken for images."""

_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_HUSHED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""The filter that ``_hush_pillow`` sets, as ``warnings.filters`` has it."""


def read_image(content: Path | bytes, where: str) -> Image:
    """Decode an image as uint8 RGB (H, W, 3).

    Args:
        content: a file, or its bytes.
        where: name of the image for messages, its key as a rule.

    Raises:
        DataError: the image is too large, too long or of a kind that is not read.
        CorruptFileError: it is missing, empty or broken.
    """
    encoded = whole_file(content, where)
    _hush_pillow()
    try:
        with PIL.Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_size(image, len(encoded), where)
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return np.array(_to_rgb(image, where))
    except DataError:
        raise
    except PIL.Image.DecompressionBombError:
        raise DataError(f"{where} has more than the {MAX_PIXELS} pixels allowed.") from None
    except PIL.UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise CorruptFileError(f"{where} is no image of a known kind ({kinds}).") from None
    except Exception as error:  # hostile bytes raise anything inside a decoder
        raise CorruptFileError(f"{where} is broken ({_short(error)}).") from None


def center_crop(image: Image, size: int) -> Image:
    """Scale and crop to (size, size, 3) as ADM does for ImageNet.

    Halve with a box filter while the short side is at least twice ``size``, scale the short side
    to ``size`` with a bicubic filter, cut the middle out. Smaller images are enlarged.
    """
    if image.shape[:2] == (size, size):
        return image
    return _crop_middle(_scale_short_side(PIL.Image.fromarray(image), size), size)


def random_crop(image: Image, size: int, generator: torch.Generator) -> Image:
    """Scale the short side to ``size`` / 0.8 at most, at random, then cut (size, size, 3) anywhere.

    The scaling is that of ``center_crop``; every randomness comes from ``generator``.
    """
    side = _draw(size, math.ceil(size / 0.8), generator)
    scaled = np.asarray(_scale_short_side(PIL.Image.fromarray(image), side))
    top = _draw(0, scaled.shape[0] - size, generator)
    left = _draw(0, scaled.shape[1] - size, generator)
    return scaled[top : top + size, left : left + size].copy()


def to_tensor(images: npt.NDArray[np.uint8] | Tensor) -> Tensor:
    """Uint8 images (..., H, W, 3) => media float32 (..., 3, H, W) in [-1, 1]."""
    media = torch.as_tensor(images).movedim(-1, -3).to(torch.float32)
    return media.contiguous().div_(127.5).sub_(1.0)


def to_uint8(media: Tensor) -> Tensor:
    """Media (..., 3, H, W) in [-1, 1] => uint8 of the same shape: rounded, clamped."""
    return media.float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_images(media: Tensor) -> npt.NDArray[np.uint8]:
    """Media (..., 3, H, W) in [-1, 1] => uint8 images (..., H, W, 3): rounded, clamped."""
    return to_uint8(media).movedim(-3, -1).contiguous().cpu().numpy()


def write_png(path: Path, image: Image) -> None:
    """Write an image (H, W, 3) atomically; equal images give equal bytes."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    files.write_bytes(path, buffer.getvalue())


def image_grid(
    images: Sequence[Image] | npt.NDArray[np.uint8],
    columns: int,
    padding: int = 2,
    background: int = 255,
) -> Image:
    """Lay images of one size out in rows.

    Args:
        images: (H, W, 3) each, at least one.
        columns: images in a row; fewer if there are fewer.
        padding: pixels between the images and around the grid.
        background: grey value of the padding and of empty places.

    Returns:
        uint8 (rows * (H + padding) + padding, columns * (W + padding) + padding, 3).
    """
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, 3)
    grid = np.full(shape, background, np.uint8)
    for index, image in enumerate(images):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def paired_grid(
    above: Sequence[Image] | npt.NDArray[np.uint8],
    below: Sequence[Image] | npt.NDArray[np.uint8],
    columns: int,
    padding: int = 2,
    background: int = 255,
) -> Image:
    """A grid of pairs, one image over the other: originals over their reconstructions."""
    pairs = [np.concatenate(pair, axis=0) for pair in zip(above, below, strict=True)]
    return image_grid(pairs, columns, padding, background)


def _hush_pillow() -> None:
    if warnings.filters[:1] != [_HUSHED]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _check_size(image: PIL.Image.Image, num_bytes: int, where: str) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise CorruptFileError(f"{where} has no pixels.")
    if width * height > MAX_PIXELS:
        raise DataError(f"{where} is {width}x{height}: more than {MAX_PIXELS} pixels.")
    if width * height > max(MAX_PIXELS_PER_BYTE * num_bytes, ALWAYS_PIXELS):
        raise DataError(f"{where} is {width}x{height}, which its {num_bytes} bytes cannot hold.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{where} is {width}x{height}: longer than {MAX_ASPECT} to 1.")


def _to_rgb(image: PIL.Image.Image, where: str) -> PIL.Image.Image:
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).clip(0, 65_535).astype(np.uint32)
        grey += 128
        grey //= 257  # rounded: 257 is odd, so nothing lies half-way
        return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{where} has floating-point pixels, whose range is not known.")
    if image.has_transparency_data:
        opaque = PIL.Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_short_side(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def _crop_middle(image: PIL.Image.Image, size: int) -> Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top : top + size, left : left + size].copy()


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120].rstrip(".") if lines else type(error).__name__
