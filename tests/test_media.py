import contextlib
import io
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentlm_core.data import media
from latentlm_core.data.media import (
    center_crop,
    image_grid,
    paired_grid,
    random_crop,
    read_image,
    to_images,
    to_tensor,
    to_uint8,
    write_png,
)
from latentlm_core.errors import CorruptFileError, DataError
from latentlm_core.runtime import generator


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_a_png_is_read_as_it_is_from_bytes_and_from_a_file(tmp_path, picture):
    content = encoded(PIL.Image.fromarray(picture))
    (tmp_path / "ü.png").write_bytes(content)
    assert np.array_equal(read_image(content, "it"), picture)
    assert np.array_equal(read_image(tmp_path / "ü.png", "it"), picture)


def test_grey_palette_and_bilevel_images_become_rgb():
    grey = PIL.Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8))
    expected = np.repeat(np.array([[0, 100], [200, 255]], np.uint8)[:, :, None], 3, axis=2)
    assert np.array_equal(read_image(encoded(grey), "grey"), expected)
    assert np.array_equal(read_image(encoded(grey.convert("P")), "palette"), expected)
    bilevel = read_image(encoded(grey.convert("1", dither=0)), "bilevel")
    assert bilevel[:, :, 0].tolist() == [[0, 0], [255, 255]]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    image = PIL.Image.fromarray(np.array([[0, 257 * 128, 65535]], np.uint16))
    assert read_image(encoded(image), "deep")[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_lies_on_white():
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 128]]], np.uint8)
    shown = read_image(encoded(PIL.Image.fromarray(pixels)), "glass")
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[0, 1].tolist() == [10, 20, 30]
    assert shown[0, 2].tolist() == [127, 127, 127]


def test_exif_orientation_is_applied(picture):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    content = encoded(PIL.Image.fromarray(picture), exif=exif)
    assert np.array_equal(read_image(content, "phone"), np.rot90(picture, -1))


def test_broken_files_are_named(tmp_path, picture):
    whole = encoded(PIL.Image.fromarray(picture), "JPEG")
    for content in (b"", b"no image at all", whole[: len(whole) // 2], whole[:20]):
        with pytest.raises(CorruptFileError, match=r"^n01/x\.jpg "):
            read_image(content, "n01/x.jpg")
    with pytest.raises(CorruptFileError, match="gone"):
        read_image(tmp_path / "gone.png", "gone")


def test_size_is_judged_by_the_header_before_a_pixel_is_decoded(monkeypatch):
    content = encoded(PIL.Image.new("1", (3000, 2000)))
    monkeypatch.setattr(media, "MAX_PIXELS", 5_000_000)
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="big is 3000x2000"):
        read_image(content, "big")


@pytest.mark.parametrize("limit", [1000, 4000])
def test_pillows_own_size_alarms_do_not_escape(monkeypatch, limit):
    """Pillow warns above its limit and raises above twice of it, both while it opens."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    content = encoded(PIL.Image.new("L", (100, 50)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if limit == 1000:
            with pytest.raises(DataError, match="bomb"):
                read_image(content, "bomb")
        else:
            assert read_image(content, "bomb").shape == (50, 100, 3)


def test_a_strip_is_refused_for_it_would_be_enlarged_beyond_memory():
    with pytest.raises(DataError, match="strip is 130x2: longer than 64 to 1"):
        read_image(encoded(PIL.Image.new("L", (130, 2))), "strip")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 600), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF"]))
def test_a_flipped_byte_gives_an_image_or_a_sentence(place, value, kind):
    content = bytearray(encoded(PIL.Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 24))))
    content = bytearray(encoded(PIL.Image.open(io.BytesIO(bytes(content))), kind))
    content[place % len(content)] = value
    with contextlib.suppress(DataError):
        image = read_image(bytes(content), "fuzzed")
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (16, 16), (5, 9), (1, 1), (33, 32)])
def test_center_crop_of_a_constant_is_that_constant(shape):
    image = np.full((*shape, 3), (7, 130, 250), np.uint8)
    cropped = center_crop(image, 16)
    assert cropped.shape == (16, 16, 3)
    assert (cropped == image[0, 0]).all()


def test_center_crop_of_twice_the_size_is_the_mean_of_two_by_two_pixels():
    image = np.random.default_rng(1).integers(0, 128, (16, 16, 3), dtype=np.uint8) * 2
    means = image.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(center_crop(image, 8) - means).max() <= 0.5


def test_center_crop_cuts_the_middle_out_of_the_long_side():
    image = np.zeros((8, 20, 3), np.uint8)
    image[:, 6:14] = 200
    assert (center_crop(image, 8) == 200).all()


def test_random_crop_is_decided_by_its_generator(picture):
    large = np.random.default_rng(2).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    crops = [random_crop(large, 32, generator("crop", seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(crop.shape == (32, 32, 3) for crop in crops)
    assert np.array_equal(crops[0], crops[1])
    assert len({crop.tobytes() for crop in crops}) == 4


def test_tensors_and_bytes_are_inverse_to_each_other():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    media_values = to_tensor(every[None])
    assert media_values.shape == (1, 3, 16, 16)
    assert media_values.dtype == torch.float32
    assert media_values.min() == -1.0
    assert media_values.max() == 1.0
    assert np.array_equal(to_images(media_values)[0], every)
    assert to_uint8(media_values).shape == (1, 3, 16, 16)


def test_bytes_are_rounded_and_clamped():
    values = torch.tensor([-3.0, -1.0, 0.4 / 127.5 - 1.0, 0.6 / 127.5 - 1.0, 1.0, 9.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_written_png_is_whole_and_deterministic(tmp_path, picture):
    write_png(tmp_path / "a.png", picture)
    write_png(tmp_path / "b.png", picture)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.array_equal(read_image(tmp_path / "a.png", "a"), picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = image_grid(images, columns=2, padding=1, background=99)
    assert grid[:, :, 0].tolist() == [
        [99] * 9,
        [99, 10, 10, 10, 99, 20, 20, 20, 99],
        [99, 10, 10, 10, 99, 20, 20, 20, 99],
        [99] * 9,
        [99, 30, 30, 30, 99, 99, 99, 99, 99],
        [99, 30, 30, 30, 99, 99, 99, 99, 99],
        [99] * 9,
    ]


def test_pairs_stand_one_over_the_other():
    black, white = np.zeros((2, 1, 1, 3), np.uint8), np.full((2, 1, 1, 3), 255, np.uint8)
    grid = paired_grid(black, white, columns=2, padding=0)
    assert grid[:, :, 0].tolist() == [[0, 0], [255, 255]]
