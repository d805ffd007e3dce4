"""Beam search against every alignment written out, and what a lexicon and a language do."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from crnn.beam import END, BeamSearch, Lexicon, NGram
from crnn.charset import Charset
from crnn.checkpoint import Checkpoint
from crnn.data.render import render_line
from crnn.errors import CheckpointError
from crnn.export import export_onnx
from crnn.reading import load_exported, read_images
from crnn.settings import ExportSettings
from tests.conftest import DIGITS, random_recogniser

ABC = Charset("abc")


def of_all_alignments(probabilities: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of every text, by the definition of CTC."""
    found: dict[tuple[int, ...], float] = {}
    frames = range(len(probabilities))
    for path in itertools.product(range(probabilities.shape[1]), repeat=len(probabilities)):
        text = tuple(number for number, _ in itertools.groupby(path) if number)
        share = math.prod(float(probabilities[frame, path[frame]]) for frame in frames)
        found[text] = found.get(text, 0.0) + share
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_most_probable_text_is_found_with_its_probability(seed: int) -> None:
    probabilities = np.random.default_rng(seed).dirichlet(np.full(4, 0.5), size=5)
    truth = of_all_alignments(probabilities)
    best = max(truth, key=lambda text: truth[text])
    found = BeamSearch(width=500, cutoff=1e-9).read(probabilities)
    assert found.classes == best
    assert found.confidence == pytest.approx(truth[best])
    assert len(found.characters) == len(best)
    assert all(0 < share <= probabilities.max() + 1e-9 for share in found.characters)


def test_texts_add_up_where_the_best_path_is_blank() -> None:
    probabilities = np.array([[0.6, 0.4], [0.6, 0.4]])
    assert BeamSearch().read(probabilities).classes == (1,), "0.64 against 0.36"
    assert probabilities.argmax(1).tolist() == [0, 0]


def test_a_letter_twice_takes_a_blank_between() -> None:
    sure = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = BeamSearch().read(sure)
    assert found.classes == (1, 1)
    assert found.characters == [1.0, 1.0]


def test_a_lexicon_allows_nothing_else() -> None:
    probabilities = np.random.default_rng(3).dirichlet(np.ones(4), size=6)
    truth = of_all_alignments(probabilities)
    lexicon = Lexicon(["ab", "cab", "abcabc", "x"], ABC)
    assert len(lexicon) == 3
    assert lexicon.unreadable == ["x"], "it is not in the charset"
    words = [(1, 2), (3, 1, 2), (1, 2, 3, 1, 2, 3)]
    found = BeamSearch(width=100, lexicon=lexicon, cutoff=1e-9).read(probabilities)
    assert found.classes == max(words, key=lambda word: truth.get(word, 0))
    nothing = BeamSearch(lexicon=Lexicon(["aaaaaaaaa"], ABC)).read(probabilities)  # In 6 frames.
    assert nothing.classes == ()
    assert nothing.confidence == 0
    assert BeamSearch(lexicon=Lexicon([], ABC)).read(probabilities).classes == ()


def test_a_lexicon_reads_over_letters_that_the_network_is_sure_of() -> None:
    sure = np.eye(4)[[1, 0, 3, 0, 2, 0]]  # It reads "acb".
    assert BeamSearch(lexicon=Lexicon(["aab", "ccc"], ABC)).read(sure).classes == (1, 1, 2)
    # Each frame prefers another beginning; the one text that fits into them is followed last.
    crowd = [f"{'abc'[n % 3]}{'abc'[n // 3 % 3]}{'abc'[n // 9]}aaaaaaaa" for n in range(27)]
    found = BeamSearch(width=1, lexicon=Lexicon([*crowd, "cab"], ABC)).read(sure)
    assert found.classes == (3, 1, 2)


def test_an_ngram_is_a_distribution_and_prefers_what_it_saw() -> None:
    language = NGram(["abc", "abb", "ab?c"], ABC)
    for text in ((), (1,), (1, 2), (3, 3, 3), (1, 2, 1, 2, 1, 2)):
        shares = [math.exp(language.log_probability(text, symbol)) for symbol in (1, 2, 3, END)]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
    assert language.log_probability((1,), 2) > language.log_probability((1,), 3)
    unsure = np.array([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.02, 0.0, 0.48, 0.5]])
    assert BeamSearch().read(unsure).classes == (1, 3)
    assert BeamSearch(language=language).read(unsure).classes == (1, 2)


def test_images_are_read_by_beam_search_where_an_export_allows_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        random_recogniser().float().eval(), Charset("0123456789"), 160, "finetune"
    )
    images = [render_line(1, number, DIGITS)[0] for number in range(3)]
    for output in ("probabilities", "classes"):
        settings = ExportSettings.model_validate({"output": output})
        export_onnx(tmp_path / f"{output}.onnx", checkpoint, settings, {})
    reader = load_exported(tmp_path / "probabilities.onnx")
    for read in read_images(reader, images, BeamSearch(lexicon=Lexicon(["12"], reader.charset))):
        assert read.text == "12"
    for read in read_images(reader, images):
        assert len(read.characters) == len(read.text)
        assert all(0 <= share <= 1 for share in read.characters)
    with pytest.raises(CheckpointError, match=r"export\.output: probabilities"):
        read_images(load_exported(tmp_path / "classes.onnx"), images, BeamSearch())
