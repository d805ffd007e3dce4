import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from crnn.data.augment import augment
from crnn.data.images import decode, fit_line
from crnn.data.render import generator, render_line
from crnn.errors import DataError
from crnn.settings import AugmentSettings, TextSettings


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey_ramp(width: int = 40, height: int = 20) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


@pytest.mark.parametrize(
    "data",
    [
        encoded(grey_ramp()),
        encoded(grey_ramp().convert("RGB"), "BMP"),
        encoded(grey_ramp().convert("P")),
        encoded(grey_ramp().convert("LA")),
        encoded(grey_ramp().convert("RGBA")),
        encoded(Image.fromarray(np.asarray(grey_ramp()).astype(np.uint16) * 257)),
        encoded(Image.fromarray(np.asarray(grey_ramp()).astype(np.uint16) * 16)),
        encoded(Image.fromarray(np.asarray(grey_ramp()).astype(np.uint16))),
        encoded(Image.fromarray(np.asarray(grey_ramp()).astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(np.asarray(grey_ramp()).astype(np.float32) / 255), "TIFF"),
        encoded(Image.fromarray(np.asarray(grey_ramp()).astype(np.float32)), "TIFF"),
        encoded(grey_ramp().convert("CMYK"), "TIFF"),
        encoded(grey_ramp(), "GIF", save_all=True, append_images=[Image.new("L", (40, 20))]),
    ],
    ids=[
        "grey",
        "bmp",
        "palette",
        "grey+alpha",
        "rgba",
        "16-bit",
        "12-bit in 16",
        "8-bit in 16",
        "32-bit",
        "share",
        "float",
        "cmyk",
        "animated",
    ],
)
def test_every_mode_becomes_the_same_rgb_picture(data: bytes) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    expected = np.asarray(grey_ramp().convert("RGB")).astype(int)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 3


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(decode(encoded(clear))).min() == 255


def png_of_width(width: int) -> bytes:
    """A PNG whose header says so, with a checksum that fits."""
    data = bytearray(encoded(grey_ramp()))
    data[16:20] = struct.pack(">I", width)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


ZERO_WIDTH = png_of_width(0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable image"),
        (b"hello", "not a readable image"),
        (ZERO_WIDTH, "not a readable image|damaged"),
        (encoded(grey_ramp(), "JPEG")[:200], "damaged|not a readable"),
        (encoded(Image.new("1", (40_000, 40_000))), "too large|not a readable"),
        (encoded(Image.new("1", (8_001, 8_000))), "too large"),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "finite"),
    ],
    ids=["empty", "text", "zero width", "truncated", "bomb", "too large", "not a number"],
)
def test_what_is_no_line_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(data)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 32), (64, 32)), ((94, 24), (125, 32)), ((50_000, 32), (320, 32)), ((1, 900), (1, 32))],
)
def test_lines_keep_their_aspect_up_to_the_maximal_width(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit_line(Image.new("RGB", size), 320).size == expected


def test_augmentation_is_a_function_of_its_key_and_keeps_the_size() -> None:
    image = grey_ramp(100, 32).convert("RGB")
    every = AugmentSettings(affine=1, blur=1, noise=1, contrast=1, jpeg=1)
    first, again, other = (np.asarray(augment(image, every, generator(1, 2, k))) for k in (3, 3, 4))
    assert first.shape == (32, 100, 3)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("change", ["affine", "blur", "noise", "contrast", "jpeg"])
def test_each_change_alone_changes_the_image_and_none_changes_nothing(change: str) -> None:
    image = render_line(0, 0, TextSettings())[0]
    off = dict.fromkeys(("affine", "blur", "noise", "contrast", "jpeg"), 0.0)
    unchanged = augment(image, AugmentSettings(**off), generator(0))
    assert (np.asarray(unchanged) == np.asarray(image)).all()
    changed = augment(image, AugmentSettings(**{**off, change: 1.0}), generator(0))
    assert (np.asarray(changed) != np.asarray(image)).any()
