"""From the bytes of an image file to an RGB array of the recogniser's height."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from crnn.errors import DataError

HEIGHT = 32
"""Rows of every line image, in pixels; the backbones reduce exactly this height to 1."""

BUCKET = 16
"""Lines are padded to the next multiple of this width, in pixels."""

PADDING = 128
"""Grey level of padding; it becomes zero, give or take 1/255, when normalised."""

VERSION = 3
"""Raise it when a change of this file gives other pixels: what was trained on the old ones is other
data."""

WHITES = tuple((1 << bits) - 1 for bits in (8, 10, 12, 14, 16))
"""Levels of white of the cameras and scanners whose grey has more than 8 bits."""

MAX_PIXELS = 64_000_000
"""Largest image that is decoded; a line is far smaller, a decompression bomb is larger."""


def decode(data: bytes) -> Image.Image:
    """Decode an image file of any common format and mode to RGB, first frame, upright.

    Transparency is laid on white. Grey of more than 8 bits is scaled to them: the brightest level
    tells whether white is that of 8, 10, 12, 14 or 16 bits or, among floats, 1.

    Raises:
        DataError: The bytes are no image, a damaged one, an empty one or a huge one, or a level is
            not a finite number.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"image of {image.width} x {image.height} px is too large")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError("not a readable image") from error
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file leads them to.
        raise DataError(f"damaged image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey levels (H, W), uint8, of an image of 16 or 32 bits or of floats."""
    grey = np.asarray(image, dtype=np.float64)
    if not np.isfinite(grey).all():
        raise DataError("image with levels that are not finite numbers")
    brightest = grey.max()
    if image.mode == "F" and brightest <= 1:
        grey = grey * 255
    else:
        white = next((white for white in WHITES if brightest <= white), WHITES[-1])
        grey = grey * (256 / (white + 1))
    levels: np.ndarray = grey.clip(0, 255).astype(np.uint8)
    return levels


def scaled_width(image: Image.Image) -> int:
    """Width in pixels at 32 px high with the aspect ratio kept."""
    return max(1, round(image.width * HEIGHT / image.height))


def fitted_width(image: Image.Image, max_width: int) -> int:
    """Width in pixels that fit_line gives the image."""
    return min(scaled_width(image), max_width)


def fit_line(image: Image.Image, max_width: int) -> Image.Image:
    """Scale to 32 px high with the aspect ratio kept, squeezed where wider than max_width."""
    width = fitted_width(image, max_width)
    if image.size == (width, HEIGHT):
        return image
    return image.resize((width, HEIGHT), Image.Resampling.BILINEAR)


def pad_lines(lines: Sequence[np.ndarray], width: int = 0) -> np.ndarray:
    """Lines (32, w_i, 3) to pixels (N, 32, W, 3), uint8, W the next multiple of BUCKET.

    W is that of a line of `width` px where all lines are narrower.
    """
    width = -(-max(width, *(line.shape[1] for line in lines)) // BUCKET) * BUCKET
    pixels = np.full((len(lines), HEIGHT, width, 3), PADDING, dtype=np.uint8)
    for image, line in zip(pixels, lines, strict=True):
        image[:, : line.shape[1]] = line
    return pixels
