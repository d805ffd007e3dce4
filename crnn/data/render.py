"""Text lines rendered from a seed: the same image for the same (seed, index) on any machine.

Fonts are the DejaVu and STIX families that matplotlib brings. Chance comes from a counter-based
generator keyed by (seed, index), and everything after the glyphs is integer arithmetic, so no
maths library can change a pixel. Glyphs are drawn by the FreeType that Pillow carries.
"""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from crnn.data.images import HEIGHT
from crnn.errors import DataError
from crnn.settings import TextSettings

FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
STYLES = ("", "-Bold", "-Oblique", "-Italic", "-BoldOblique", "-BoldItalic", "Bol", "Ita", "BolIta")
VERSION = 1
"""Raise when the same (seed, index) gives another image."""


def generator(*key: int) -> np.random.Generator:
    """A random generator that is a function of its key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@cache
def fonts_for(alphabet: str) -> tuple[Path, ...]:
    """The fonts that have a glyph of their own for every character of the alphabet.

    Raises:
        DataError: No font has them all.
    """
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    names = [folder / f"{family}{style}.ttf" for family in FAMILIES for style in STYLES]
    wanted = {ord(character) for character in alphabet if not character.isspace()}
    chosen = tuple(path for path in names if path.exists() and wanted <= _glyphs(path))
    if not chosen:
        raise DataError(
            f"no font can render every character of data.text.alphabet {alphabet!r};"
            " use characters of the DejaVu fonts"
        )
    return chosen


@cache
def _glyphs(font: Path) -> frozenset[int]:
    with TTFont(font, lazy=True) as opened:
        return frozenset(opened.getBestCmap())


@cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def render_label(seed: int, index: int, text: TextSettings) -> str:
    """The label of a line: a random string over the alphabet."""
    rng = generator(seed, index, 0)
    length = rng.integers(text.min_length, text.max_length + 1)
    return "".join(text.alphabet[i] for i in rng.integers(0, len(text.alphabet), length))


def render_line(seed: int, index: int, text: TextSettings) -> tuple[Image.Image, str]:
    """Render one line, 32 px high, and its label.

    Varied: font, size, weight, slant, rotation, position, colours, background, blur, contrast
    and noise.
    """
    label = render_label(seed, index, text)
    rng = generator(seed, index, 1)
    mask = _glyph_mask(label, text, rng)
    ink, paper = _shades(rng)
    pixels = _blend(mask, _background(mask.shape, paper, rng), ink, rng)
    return Image.fromarray(pixels), label


def _glyph_mask(label: str, text: TextSettings, rng: np.random.Generator) -> np.ndarray:
    """Coverage of the ink, (32, W) in 0..255: drawn at twice the size, turned, scaled down."""
    fonts = fonts_for(text.alphabet)
    font = _font(fonts[rng.integers(len(fonts))], int(rng.integers(36, 52)))
    left, top, right, bottom = font.getbbox(label)
    margin_x, margin_y = (int(v) for v in rng.integers(4, 16, 2))
    size = (int(right - left) + 2 * margin_x, int(bottom - top) + 2 * margin_y)
    canvas = Image.new("L", size)
    ImageDraw.Draw(canvas).text((margin_x - left, margin_y - top), label, fill=255, font=font)
    # Shear and rotation in 1/256 steps: exact in binary, so no rounding differs between machines.
    shear, slope = int(rng.integers(-48, 49)) / 256, int(rng.integers(-8, 9)) / 256
    centre_x, centre_y = size[0] // 2, size[1] // 2
    slope = slope * min(1, 128 / size[0])
    matrix = (1, shear, -shear * centre_y, slope, 1, -slope * centre_x)
    canvas = canvas.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    width = max(HEIGHT // 4, size[0] * HEIGHT // size[1])
    return np.asarray(canvas.resize((width, HEIGHT), Image.Resampling.BILINEAR))


def _shades(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ink and paper colours, at least 70 levels apart, either of them the darker."""
    dark = rng.integers(0, 110, 3)
    light = dark.max() + 70 + rng.integers(0, 186 - dark.max(), 3)
    return (light, dark) if rng.random() < 0.2 else (dark, light)


def _background(shape: tuple[int, ...], paper: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paper with a linear change of light across it, (32, W, 3), int64."""
    height, width = shape
    tilt_x, tilt_y = rng.integers(-20, 21, 2)
    ramp = (
        tilt_x * np.arange(width)[None, :] // width + tilt_y * np.arange(height)[:, None] // height
    )
    lit: np.ndarray = paper + ramp[..., None]
    return lit


def _blend(
    mask: np.ndarray, background: np.ndarray, ink: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Ink over the background, blurred and noisy, (32, W, 3), uint8."""
    coverage = mask.astype(np.int64)
    for _ in range(rng.integers(0, 3)):
        coverage = _smooth(_smooth(coverage).T).T
    cover = coverage[..., None]
    pixels: np.ndarray = (background * (255 - cover) + ink * cover) // 255
    # The sum of four uniform integers is close enough to a normal distribution.
    amplitude = int(rng.integers(0, 12))
    noise = rng.integers(-amplitude, amplitude + 1, (4, *mask.shape)).sum(0) // 2
    noisy: np.ndarray = (pixels + noise[..., None]).clip(0, 255).astype(np.uint8)
    return noisy


def _smooth(rows: np.ndarray) -> np.ndarray:
    """Binomial 1-2-1 blur along the last axis, in integers."""
    padded = np.pad(rows, ((0, 0), (1, 1)), mode="edge")
    smooth: np.ndarray = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) // 4
    return smooth
