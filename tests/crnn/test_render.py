import hashlib

import numpy as np
import pytest
from fontTools.ttLib import TTFont

from crnn.data.render import fonts_for, render_line
from crnn.errors import DataError
from crnn.settings import TextSettings

GOLDEN = "4a2da52119e9e9fdfdfa4b190a6dfc49fef9ada17a775dd4c104a8bd8dfe6f69"
"""SHA-256 over the first 20 images and labels of seed 0."""


def test_the_same_seed_and_index_give_the_same_image_everywhere() -> None:
    total = hashlib.sha256()
    for index in range(20):
        image, label = render_line(0, index, TextSettings())
        total.update(np.asarray(image).tobytes() + label.encode())
    assert total.hexdigest() == GOLDEN


def test_images_are_lines_and_differ_by_seed_and_index() -> None:
    images = {
        render_line(seed, index, TextSettings())[0].tobytes() for seed in (0, 1) for index in (0, 1)
    }
    assert len(images) == 4
    for index in range(50):
        image, label = render_line(0, index, TextSettings())
        assert image.height == 32
        assert image.width >= 8
        assert 3 <= len(label) <= 8


def test_every_font_has_a_glyph_of_its_own_for_each_character() -> None:
    fonts = fonts_for("0Az")
    assert len(fonts) >= 12
    for path in fonts:
        with TTFont(path) as font:
            names = {font.getBestCmap()[ord(character)] for character in "0Az"}
        assert len(names) == 3
        assert ".notdef" not in names
    assert not any("Display" in path.name for path in fonts)


def test_characters_no_font_has_are_refused() -> None:
    with pytest.raises(DataError, match="no font"):
        fonts_for("京")
