"""The characters a recogniser can read, and their class numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from crnn.errors import DataError

BLANK = 0
"""Class of the CTC blank; character i of the charset is class i + 1."""


@dataclass(frozen=True)
class Charset:
    """An ordered set of characters, one class each, after the CTC blank."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters:
            raise DataError("a charset needs at least one character; this one is empty")
        repeated = sorted(c for c in set(self.characters) if self.characters.count(c) > 1)
        if repeated:
            raise DataError(f"a charset names each character once; repeated here: {repeated}")

    @classmethod
    def load(cls, path: Path) -> "Charset":
        """Read a UTF-8 file that holds all characters in one line, or one character a line.

        Only line ends are stripped: a space is a character like any other.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        except OSError as error:
            raise DataError(f"cannot read charset file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"charset file {path} is not UTF-8 (byte {error.start}); save it as UTF-8"
            ) from error
        if len(lines) <= 1:
            return cls("".join(lines))
        long = [number for number, line in enumerate(lines, 1) if len(line) != 1]
        if long:
            raise DataError(
                f"charset file {path} has {len(lines)} lines, so each holds exactly one character;"
                f" line {long[0]} does not"
            )
        return cls("".join(lines))

    @property
    def classes(self) -> int:
        """Number of classes of the CTC head, the blank included."""
        return len(self.characters) + 1

    @cached_property
    def _class_of(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.characters, BLANK + 1)}

    def unknown(self, label: str) -> str:
        """The characters of the label, each once, that the charset lacks."""
        return "".join(dict.fromkeys(c for c in label if c not in self._class_of))

    def encode(self, label: str) -> list[int]:
        """Class numbers of the label's characters; KeyError where one is unknown."""
        return [self._class_of[character] for character in label]

    def decode(self, classes: Sequence[int]) -> str:
        """Text of a best path: repeats collapsed, then blanks dropped (Graves et al. 2006)."""
        previous = BLANK
        text = []
        for current in classes:
            if current != previous and current != BLANK:
                text.append(self.characters[current - 1])
            previous = current
        return "".join(text)
