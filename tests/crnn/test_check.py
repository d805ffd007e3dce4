from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crnn.charset import Charset
from crnn.data.check import check_split, needed_frames, refuse_bad, training_charset
from crnn.data.sources import LabelFile
from crnn.errors import DataError


@pytest.fixture
def faulty(label_folder: Path) -> LabelFile:
    """24 good lines and one of each fault."""
    (label_folder / "images" / "text.png").write_text("not an image")
    (label_folder / "images" / "empty.png").write_bytes(b"")
    Image.new("RGB", (12, 32)).save(label_folder / "images" / "narrow.png")
    with (label_folder / "train.txt").open("a", encoding="utf-8") as file:
        file.write("images/text.png\t1\nimages/empty.png\t2\nimages/0.png\t\n")
        file.write("images/0.png\t1x\nimages/narrow.png\t1234\nimages/gone.png\t5\nno tab\n")
    return LabelFile(label_folder / "train.txt", label_folder)


def test_every_fault_is_counted_and_listed(faulty: LabelFile) -> None:
    checked = check_split("train", faulty, Charset("0123456789"), (320, 4))
    counts = {"total": 31, "usable": 24, "bad": 7}
    assert checked.counts == {**counts, "squeezed": 0, "widest_px": checked.widths.max()}
    assert checked.indices.tolist() == list(range(24))
    assert (checked.widths >= 8).all()
    assert [bad.reason for bad in checked.bad] == [
        "unreadable",
        "unreadable",
        "empty label",
        "characters outside the charset",
        "label too long for CTC",
        "unreadable",
        "unreadable",
    ]
    assert "'x' in '1x'" in checked.bad[3].detail
    assert "needs 4 frames, the image has 3" in checked.bad[4].detail


def test_lines_wider_than_allowed_are_squeezed_and_counted(label_folder: Path) -> None:
    (label_folder / "wide.txt").write_text("wide.png\t123456\nwide.png\t1234567890\n")
    Image.new("RGB", (800, 64)).save(label_folder / "wide.png")
    source = LabelFile(label_folder / "wide.txt", label_folder)
    checked = check_split("train", source, Charset("0123456789"), (32, 4))
    assert (checked.widths.tolist(), checked.squeezed, checked.widest) == ([32], 1, 400)
    detail = "needs 10 frames, the image's 100 are squeezed to 8 by data.max_width"
    assert detail in checked.bad[0].detail
    exact = check_split("train", source, Charset("0123456789"), (400, 4))
    assert (exact.widths.tolist(), exact.squeezed, exact.widest) == ([400, 400], 0, 400)


def test_refusal_counts_by_reason_and_names_ten(faulty: LabelFile) -> None:
    checked = check_split("train", faulty, Charset("0123456789"), (320, 4))
    with pytest.raises(DataError) as caught:
        refuse_bad({"train": checked, "val": checked})
    message = str(caught.value)
    assert "14 of 62 samples cannot be used (8 unreadable, 2 empty label" in message
    assert "on_bad_sample=skip" in message
    assert message.count("\n  train ") == 10
    assert "and 4 more" in message


def test_good_samples_pass(label_folder: Path) -> None:
    source = LabelFile(label_folder / "val.txt", label_folder)
    refuse_bad({"val": check_split("val", source, Charset("0123456789"), (320, 4))})


def test_the_charset_of_the_training_labels(faulty: LabelFile, tmp_path: Path) -> None:
    assert set(training_charset(faulty).characters) >= {"1", "x"}
    (tmp_path / "none.txt").write_text("a.png\t\n")
    with pytest.raises(DataError, match="of 1 training labels none has any character; is the data"):
        training_charset(LabelFile(tmp_path / "none.txt", tmp_path))
    (tmp_path / "spaces.txt").write_text("a.png one\nb.png two\n")
    fault = "of 2 training labels none .* is spaces.txt sample 1: line has no tab between"
    with pytest.raises(DataError, match=fault):
        training_charset(LabelFile(tmp_path / "spaces.txt", tmp_path))


@given(st.text(alphabet="ab", max_size=12))
def test_needed_frames_is_the_shortest_path_ctc_accepts(label: str) -> None:
    path: list[str] = []
    for character in label:
        if path and path[-1] == character:
            path.append("-")
        path.append(character)
    assert needed_frames(label) == len(path)
