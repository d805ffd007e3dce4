"""Where labelled lines come from: a label file, an LMDB, or a seed.

A source knows its samples by number and reads one at a time, so memory does not grow with the
images. It can be sent to another process; files are opened there again.
"""

import hashlib
import json
import os
import weakref
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from functools import cached_property
from io import BufferedReader
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

import lmdb
import numpy as np
import PIL
from PIL import Image, features

from crnn.data.images import decode
from crnn.data.render import VERSION, fonts_for, render_label, render_line
from crnn.errors import DataError, StoppedError, Stopping, never
from crnn.files import sha256
from crnn.settings import DataSettings, TextSettings

BLOCK = 1 << 24
"""Bytes of a label file or an LMDB that are looked through at once."""

LINE = 512
"""Bytes that are read of a label file first: more than most lines have."""


class Source(Protocol):
    """Labelled line images by number."""

    def __len__(self) -> int:
        """Number of samples."""

    def name(self, index: int) -> str:
        """What a person calls the sample: its path or key."""

    def label(self, index: int) -> str:
        """The text; DataError where there is none to read."""

    def image(self, index: int) -> Image.Image:
        """The decoded RGB image; DataError where it cannot be read."""


class Dataset(Source, Protocol):
    """A split of the settings: samples whose content has a fingerprint."""

    def stamp(self) -> str:
        """Hash of the name, size and modification time of every file: cheap, no file is read."""

    def digest(self, stopping: Stopping = never) -> str:
        """SHA-256 over labels and images: changes when any sample does.

        Args:
            stopping: Asked now and then while files are read; StoppedError once it says so.
        """


class LabelFile:
    """A UTF-8 text file with one `path<TAB>label` a line, paths relative to its root.

    A byte order mark and CRLF are accepted; empty lines are no samples. A line with more columns,
    or of a file whose lines end with CR alone, is a bad sample.
    """

    def __init__(self, path: Path, root: Path, allow_outside_root: bool = False) -> None:
        self.path = path
        self.root = root
        self.allow_outside_root = allow_outside_root
        if not path.is_file():
            raise DataError(f"no label file at {path}; set data.root and data.train or data.val")

    @cached_property
    def _file(self) -> int:
        """Its descriptor. Not a map: a file that shrinks kills whoever has it mapped."""
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _from_its_start(self) -> BufferedReader:
        """The file that the samples are read from, also when another has taken its path since."""
        file = os.fdopen(self._file, "rb", closefd=False)
        file.seek(0)
        return file

    @cached_property
    def _starts(self) -> np.ndarray:
        """Byte offset of each non-empty line."""
        found, before = [np.zeros(0, np.int64)], b"\n"
        with self._from_its_start() as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            offset = file.tell()
            while block := file.read(BLOCK):
                data = np.frombuffer(before + block, np.uint8)
                begins = (data[:-1] == ord("\n")) & ~np.isin(data[1:], (ord("\n"), ord("\r")))
                found.append(np.flatnonzero(begins) + offset)
                offset, before = offset + len(block), block[-1:]
        return np.concatenate(found)

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("path", "root", "allow_outside_root")}

    def __len__(self) -> int:
        return len(self._starts)

    def _fields(self, index: int) -> tuple[str, str]:
        if index >= len(self):
            raise DataError(f"{self.path} has fewer lines than it had")
        start = int(self._starts[index])
        line = b""
        while b"\n" not in line and (more := self._after(start, len(line))):
            line += more
        line = line.partition(b"\n")[0]
        try:
            path, tab, label = line.decode("utf-8").rstrip("\r").partition("\t")
        except UnicodeDecodeError as error:
            raise DataError("line is not UTF-8") from error
        if not tab:
            raise DataError("line has no tab between path and label")
        if "\t" in label or "\r" in label:
            raise DataError(f"line has more than path and label: {label[:40]!r} has a tab or a CR")
        return path, label

    def _after(self, start: int, read: int) -> bytes:
        """What follows in a line, as much again: a line without end is not read 512 at a time."""
        return os.pread(self._file, max(LINE, read), start + read)

    def name(self, index: int) -> str:
        try:
            return self._fields(index)[0]
        except DataError:
            return f"{self.path.name} sample {index + 1}"

    def label(self, index: int) -> str:
        return self._fields(index)[1]

    def image(self, index: int) -> Image.Image:
        return decode(_read(self._inside_root(self._fields(index)[0])))

    def _inside_root(self, name: str) -> Path:
        if "\0" in name:
            raise DataError("image path holds a NUL byte")
        outside = ".." in Path(name).parts or Path(name).is_absolute()
        if outside and not self.allow_outside_root:
            raise DataError("image path leads out of data.root; data.allow_outside_root permits it")
        return self.root / name

    def _files(self) -> Iterator[tuple[str, Path]]:
        for index in range(len(self)):
            try:
                name = self._fields(index)[0]
                yield name, self._inside_root(name)
            except DataError:
                continue  # Its line is in the label file's own digest; the check reports it.

    def stamp(self) -> str:
        return _stamp(chain([self.path], (path for _, path in self._files())))

    def digest(self, stopping: Stopping = never) -> str:
        with self._from_its_start() as file:
            total = hashlib.file_digest(file, "sha256")
        for name, path in self._files():
            _heed(stopping)
            total.update(name.encode())
            try:
                total.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError:
                total.update(b"unreadable")
        return total.hexdigest()


class Lmdb:
    """An LMDB in the layout of most recognition data sets.

    Keys: `num-samples`, and from 1 on `image-%09d` and `label-%09d`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "data.mdb").is_file():
            raise DataError(f"no LMDB at {path} (a folder with data.mdb); set data.root")
        _close_outdated(path.resolve())

    @property
    def _environment(self) -> lmdb.Environment:
        return _opened(self.path.resolve())

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def _get(self, key: str) -> bytes:
        try:
            with self._environment.begin() as transaction:
                value = transaction.get(key.encode())
        except lmdb.Error as error:
            raise DataError(f"LMDB at {self.path} is damaged: {error}") from error
        if value is None:
            raise DataError(f"no key {key}")
        return bytes(value)

    @cached_property
    def _count(self) -> int:
        try:
            count = int(self._get("num-samples"))
            if count < 0:
                raise ValueError(f"{count} samples")
            return count
        except (DataError, ValueError) as error:
            raise DataError(
                f"LMDB at {self.path} has no usable key num-samples ({error})"
            ) from error

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"image-{index + 1:09d}"

    def label(self, index: int) -> str:
        try:
            label = self._get(f"label-{index + 1:09d}").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("label is not UTF-8") from error
        if any(mark in label for mark in "\t\r\n"):
            raise DataError(f"label {label[:40]!r} has a tab or the end of a line")
        return label

    def image(self, index: int) -> Image.Image:
        return decode(self._get(self.name(index)))

    def stamp(self) -> str:
        return _stamp([self.path / "data.mdb"])

    def digest(self, stopping: Stopping = never) -> str:
        total = hashlib.sha256()
        with (self.path / "data.mdb").open("rb") as file:
            while block := file.read(BLOCK):
                _heed(stopping)
                total.update(block)
        return total.hexdigest()


class Shards:
    """A folder of LMDBs, one after another in the order of their names.

    Each has a fingerprint of its own: those that have not changed are not hashed again.
    """

    def __init__(self, path: Path) -> None:
        self.shards = [Lmdb(file.parent) for file in sorted(path.glob("*/data.mdb"))]
        if not self.shards:
            raise DataError(
                f"{path} is neither an LMDB (a folder with data.mdb) nor a folder of some;"
                " set data.root and data.train or data.val"
            )

    @cached_property
    def _starts(self) -> list[int]:
        """Number of the first sample of each shard, and of all samples."""
        return list(accumulate((len(shard) for shard in self.shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[Lmdb, int]:
        shard = bisect_right(self._starts, index) - 1
        return self.shards[shard], index - self._starts[shard]

    def name(self, index: int) -> str:
        shard, within = self._place(index)
        return f"{shard.path.name}/{shard.name(within)}"

    def label(self, index: int) -> str:
        shard, within = self._place(index)
        return shard.label(within)

    def image(self, index: int) -> Image.Image:
        shard, within = self._place(index)
        return shard.image(within)


class Rendered:
    """Lines rendered from a seed."""

    def __init__(self, count: int, seed: int, text: TextSettings) -> None:
        self.count = count
        self.seed = seed
        self.text = text

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"rendered {self.seed}/{index}"

    def label(self, index: int) -> str:
        return render_label(self.seed, index, self.text)

    def image(self, index: int) -> Image.Image:
        return render_line(self.seed, index, self.text)[0]

    def stamp(self) -> str:
        return self.digest()

    def digest(self, stopping: Stopping = never) -> str:  # It is done at once.
        # Another FreeType draws other pixels, and so may other fonts, another Pillow or numpy.
        fonts = [sha256(path) for path in fonts_for(self.text.alphabet)]
        libraries = [features.version("freetype2"), PIL.__version__, np.__version__]
        drawn_by = [VERSION, fonts, libraries]
        made_of = [drawn_by, self.count, self.seed, self.text.model_dump()]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def open_source(settings: DataSettings, split: str, seed: int) -> Dataset | Shards:
    """Open the train or val split of the settings.

    Args:
        settings: A split that is a number is rendered, a folder is an LMDB or holds some, a file
            has labels.
        split: "train" or "val".
        seed: Of the experiment; the two rendered splits differ.
    """
    place = settings.train if split == "train" else settings.val
    if isinstance(place, int):
        fonts_for(settings.text.alphabet)  # What cannot be drawn is said once, not of every line.
        return Rendered(place, 2 * seed + (split == "val"), settings.text)
    root = Path(settings.root)
    if not root.is_dir():
        raise DataError(f"data.root {root} is no folder; set it with --set data.root=FOLDER")
    if (root / place / "data.mdb").exists():
        return Lmdb(root / place)
    if (root / place).is_dir():
        return Shards(root / place)
    return LabelFile(root / place, root, settings.allow_outside_root)


_environments: dict[Path, tuple[str, lmdb.Environment]] = {}
"""LMDB allows one a folder and process, whoever asks for it. With the stamp of its file."""


def _opened(path: Path) -> lmdb.Environment:
    if path not in _environments:
        _environments[path] = (_stamp([path / "data.mdb"]), _open(path))
    return _environments[path][1]


def _close_outdated(path: Path) -> None:
    """Close an LMDB that has been replaced or has grown since this process opened it."""
    if path in _environments and _environments[path][0] != _stamp([path / "data.mdb"]):
        _environments.pop(path)[1].close()


def _open(path: Path) -> lmdb.Environment:
    try:
        opened = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"LMDB at {path} cannot be opened: {error}") from error
    # It is mapped into memory: a read behind the end of the file would kill the process.
    needed = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    size = (path / "data.mdb").stat().st_size
    if size < needed:
        raise DataError(f"LMDB at {path} is truncated: {size} of {needed} bytes; copy it again")
    return opened


def _heed(stopping: Stopping) -> None:
    if stopping():
        raise StoppedError("stopped while the data was read")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read image file ({error.strerror})") from error


def _stamp(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
            total.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            total.update(f"{path}\0absent\n".encode())
    return total.hexdigest()
