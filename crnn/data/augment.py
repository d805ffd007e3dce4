"""Changes to a line image that leave its text as it is."""

import io

import numpy as np
from PIL import Image, ImageFilter

from crnn.settings import AugmentSettings


def augment(image: Image.Image, settings: AugmentSettings, rng: np.random.Generator) -> Image.Image:
    """Apply each change with its own probability; the image keeps its size.

    Args:
        image: RGB line image.
        settings: Probability of each change.
        rng: The only source of chance, so that the result is a function of its seed.
    """
    steps = (
        (settings.affine, _affine),
        (settings.contrast, _contrast),
        (settings.blur, _blur),
        (settings.noise, _noise),
        (settings.jpeg, _jpeg),
    )
    for probability, change in steps:
        if rng.random() < probability:
            image = change(image, rng)
    return image


def _affine(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shear by up to 0.3, rotate by up to 2 degrees, scale by up to 10%, shift by up to 2 px.

    A long line is enlarged less, so that this takes 3 px at most off either end, as a character
    that is cut off would still be in the label; shift and, towards the upper and lower edge, shear
    can take some more.
    """
    width, height = image.size
    shear = rng.uniform(-0.3, 0.3)
    slope = np.tan(np.radians(rng.uniform(-2, 2))) * min(1, 128 / width)
    scale_x, scale_y = rng.uniform(max(0.92, 1 - 6 / width), 1.1), rng.uniform(0.92, 1.1)
    shift_x, shift_y = rng.uniform(-2, 2, 2)
    centre_x, centre_y = width / 2, height / 2
    # Pillow maps output (x, y) to input (a x + b y + c, d x + e y + f); keep the centre fixed.
    a, b, d, e = scale_x, shear, slope, scale_y
    c = centre_x - a * centre_x - b * centre_y + shift_x
    f = centre_y - d * centre_x - e * centre_y + shift_y
    border = tuple(int(v) for v in np.median(np.asarray(image)[:, [0, -1]], axis=(0, 1)))
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=border,
    )


def _contrast(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Contrast by 0.5 to 1.4 about mid-grey, brightness by up to 40 levels, gamma 0.7 to 1.4."""
    gain, offset, power = rng.uniform(0.5, 1.4), rng.uniform(-40, 40), rng.uniform(0.7, 1.4)
    levels = 255 * (np.arange(256) / 255) ** power
    table = ((levels - 127.5) * gain + 127.5 + offset).clip(0, 255).astype(np.uint8)
    return image.point(table.tolist() * 3)


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noise = rng.standard_normal(pixels.shape[:2], dtype=np.float32) * rng.uniform(3, 16)
    return Image.fromarray((pixels + noise[..., None]).clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(25, 75)))
    with Image.open(buffer) as compressed:
        return compressed.convert("RGB")
