from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crnn.charset import Charset
from crnn.errors import DataError


@pytest.mark.parametrize(
    "content",
    ["ab ", "a\nb\n \n", "\ufeffab ", "a\r\nb\r\n \r\n"],
    ids=["one line", "one a line", "byte order mark", "CRLF"],
)
def test_both_layouts_of_a_charset_file_keep_the_space(tmp_path: Path, content: str) -> None:
    path = tmp_path / "charset.txt"
    path.write_bytes(content.encode("utf-8"))
    assert Charset.load(path).characters == "ab "


@pytest.mark.parametrize("content", ["a\u2028b\x85\x0c", "a\n\u2028\nb\n\x85\n\x0c\n"])
def test_only_the_end_of_a_line_ends_a_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "charset.txt"
    path.write_text(content, encoding="utf-8")
    assert Charset.load(path).characters == "a\u2028b\x85\x0c"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least one character"),
        (b"abca", "repeated here: ['a']"),
        (b"a\nbc\n", "line 2 does not"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_unusable_charset_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "charset.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Charset.load(path)
    assert message in str(caught.value)


def test_a_missing_charset_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        Charset.load(tmp_path / "nowhere")


@given(st.text(alphabet="abc", max_size=8))
def test_decode_inverts_encode_with_blanks_between(label: str) -> None:
    charset = Charset("abc")
    path = [c for code in charset.encode(label) for c in (code, 0)]
    assert charset.decode(path) == label


@pytest.mark.parametrize(
    ("path", "text"),
    [([], ""), ([0, 0], ""), ([1, 1, 1], "a"), ([1, 0, 1], "aa"), ([2, 2, 0, 1, 3], "bac")],
)
def test_repeats_collapse_before_blanks_are_dropped(path: list[int], text: str) -> None:
    assert Charset("abc").decode(path) == text
