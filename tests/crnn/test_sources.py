import os
import pickle
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from crnn.data import sources
from crnn.data.sources import LabelFile, Lmdb, Rendered, Shards, Source, open_source
from crnn.errors import DataError
from crnn.settings import DataSettings, TextSettings


def write_lmdb(folder: Path, root: Path, count: int | None = None, split: str = "val") -> Path:
    """A split of a label folder as an LMDB, which says that it has so many samples."""
    labels = LabelFile(root / f"{split}.txt", root)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        lmdb.open(str(folder), map_size=1 << 24) as environment,
        environment.begin(write=True) as t,
    ):
        t.put(b"num-samples", str(count or len(labels)).encode())
        for index in range(len(labels)):
            t.put(f"image-{index + 1:09d}".encode(), (root / labels.name(index)).read_bytes())
            t.put(f"label-{index + 1:09d}".encode(), labels.label(index).encode())
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_label_files_with_any_line_end_read_the_same(
    tmp_path: Path, encoding: str, newline: str, last: str
) -> None:
    path = tmp_path / "labels.txt"
    text = "a.png\tone two\n\nb/c.png\t 京A ".replace("\n", newline) + last.replace("\n", newline)
    path.write_bytes(text.encode(encoding))
    source = LabelFile(path, tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b/c.png"]
    assert [source.label(i) for i in range(len(source))] == ["one two", " 京A "]


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_lines_are_found_wherever_the_blocks_end(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("a.png\t1\r\n\r\n\nb.png\t2\n".encode("utf-8-sig"))
    monkeypatch.setattr(sources, "BLOCK", block)
    source = LabelFile(path, tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b.png"]


def test_a_label_file_with_fewer_lines_than_before_says_so(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("a.png\t1\n")
    with pytest.raises(DataError, match=r"labels\.txt has fewer lines than it had"):
        LabelFile(path, tmp_path).label(1)


def test_a_label_file_that_shrinks_under_a_reader_kills_nobody(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{number}.png\tsome text\n" for number in range(20_000)))
    source = LabelFile(path, tmp_path)
    assert source.label(19_999) == "some text"
    os.truncate(path, 10)
    with pytest.raises(DataError, match="no tab"):
        source.label(19_999)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no tab here", "no tab"),
        (b"a.png\t\xff", "not UTF-8"),
        (b"../a.png\tx", "leads out of data.root"),
        (b"/etc/passwd\tx", "leads out of data.root"),
        (b"a\0.png\tx", "NUL byte"),
        (b"a.png\tx\t0.98", r"more than path and label: 'x\\t0.98' has a tab or a CR"),
        (b"a.png\tx\rb.png\ty", "has a tab or a CR"),
        (b"x" * 10_000_000, "no tab"),
        (b"gone.png\tx", "cannot read image file"),
    ],
)
def test_each_fault_of_a_label_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(line + b"\n")
    source = LabelFile(path, tmp_path)
    with pytest.raises(DataError, match=message):
        source.image(0)


def test_lmdb_reads_as_the_label_file_it_was_made_from(label_folder: Path, tmp_path: Path) -> None:
    labels = LabelFile(label_folder / "val.txt", label_folder)
    source = Lmdb(write_lmdb(tmp_path / "db", label_folder))
    assert len(source) == len(labels) == 8
    for index in range(8):
        assert source.label(index) == labels.label(index)
        assert (np.asarray(source.image(index)) == np.asarray(labels.image(index))).all()


def test_shards_read_one_after_another(label_folder: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_lmdb(tmp_path / "shards" / name, label_folder)
    shards, whole = Shards(tmp_path / "shards"), LabelFile(label_folder / "val.txt", label_folder)
    assert len(shards) == 2 * len(whole)
    for index in range(len(shards)):
        shard, within = "ab"[index // len(whole)], index % len(whole)
        assert shards.name(index) == f"{shard}/image-{within + 1:09d}"
        assert shards.label(index) == whole.label(within)
        assert shards.image(index).tobytes() == whole.image(within).tobytes()
    with pytest.raises(DataError, match="neither an LMDB"):
        Shards(label_folder)


def test_lmdb_faults_are_named(label_folder: Path, tmp_path: Path) -> None:
    source = Lmdb(write_lmdb(tmp_path / "db", label_folder, count=9))
    with pytest.raises(DataError, match="image-000000009"):
        source.image(8)
    with pytest.raises(DataError, match="no LMDB"):
        Lmdb(tmp_path)
    with pytest.raises(DataError, match="num-samples"):
        len(Lmdb(write_lmdb(tmp_path / "none", label_folder, count="many")))  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", ["\n", "\r", "\t"])
def test_a_label_of_an_lmdb_is_one_line(label_folder: Path, tmp_path: Path, mark: str) -> None:
    folder = write_lmdb(tmp_path / "db", label_folder)
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as t:
        t.put(b"label-000000001", f"12{mark}".encode())
    with pytest.raises(DataError, match="has a tab or the end of a line"):
        Lmdb(folder).label(0)


def test_an_lmdb_that_has_been_replaced_or_has_grown_is_opened_anew(
    label_folder: Path, tmp_path: Path
) -> None:
    folder = write_lmdb(tmp_path / "db", label_folder)
    assert len(Lmdb(folder)) == 8
    other = write_lmdb(tmp_path / "other", label_folder, count=7)
    (other / "data.mdb").replace(folder / "data.mdb")
    assert len(Lmdb(folder)) == 7
    grow = f"""
import lmdb
with lmdb.open({str(folder)!r}, map_size=1 << 26) as environment:
    with environment.begin(write=True) as t:
        t.put(b"more", bytes(1 << 25))
        t.put(b"num-samples", b"6")
"""
    subprocess.run([sys.executable, "-c", grow], check=True)
    assert len(Lmdb(folder)) == 6


def test_a_truncated_lmdb_is_refused_before_it_kills_the_process(
    label_folder: Path, tmp_path: Path
) -> None:
    folder = write_lmdb(tmp_path / "db", label_folder)
    whole = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"truncated: \d+ of \d+ bytes; copy it again"):
        len(Lmdb(folder))


def every_source(label_folder: Path, tmp_path: Path) -> list[Source]:
    return [
        LabelFile(label_folder / "val.txt", label_folder),
        Lmdb(write_lmdb(tmp_path / "db", label_folder)),
        Shards(write_lmdb(tmp_path / "shards" / "one", label_folder).parent),
        Rendered(8, 3, TextSettings()),
    ]


def test_sources_survive_the_way_to_another_process(label_folder: Path, tmp_path: Path) -> None:
    for source in every_source(label_folder, tmp_path):
        image = source.image(2)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.image(2).tobytes() == image.tobytes()


def test_the_digest_changes_with_a_label_and_with_a_pixel(label_folder: Path) -> None:
    source = LabelFile(label_folder / "val.txt", label_folder)
    before = source.digest()
    assert LabelFile(label_folder / "val.txt", label_folder).digest() == before
    first = label_folder / source.name(0)
    image = source.image(0)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(first)
    with_pixel = LabelFile(label_folder / "val.txt", label_folder).digest()
    assert with_pixel != before
    labels = label_folder / "val.txt"
    labels.write_text(labels.read_text().replace("\t", "\t0", 1))
    assert LabelFile(labels, label_folder).digest() not in (before, with_pixel)


def test_the_kind_of_source_follows_from_what_is_there(label_folder: Path) -> None:
    write_lmdb(label_folder / "db", label_folder)
    settings = DataSettings(root=str(label_folder), train=5, val="db")
    assert isinstance(open_source(settings, "train", 0), Rendered)
    assert isinstance(open_source(settings, "val", 0), Lmdb)
    in_shards = DataSettings(root=str(label_folder.parent), train=1, val=label_folder.name)
    assert isinstance(open_source(in_shards, "val", 0), Shards)
    with pytest.raises(DataError, match="no label file"):
        open_source(DataSettings(root=str(label_folder), train="gone.txt", val=1), "train", 0)
    with pytest.raises(DataError, match=r"data\.root"):
        open_source(DataSettings(root="/nowhere", train="a.txt", val=1), "train", 0)


def test_paths_out_of_the_root_are_read_where_that_is_allowed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (40, 32)).save(tmp_path / "outside.png")
    (root / "labels.txt").write_text("../outside.png\tx\n", encoding="utf-8")
    settings = DataSettings(root=str(root), train="labels.txt", val=1, allow_outside_root=True)
    assert open_source(settings, "train", 0).image(0).size == (40, 32)
