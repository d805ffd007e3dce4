"""Decoding that weighs whole texts: prefix beam search, with a lexicon or a character n-gram.

Prefix beam search of Hannun et al. 2014 (arXiv:1408.2873): of each text the probabilities of all
its alignments are added, where greedy decoding takes the most probable alignment alone.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from crnn.charset import BLANK, Charset

NEVER = -math.inf

END = -1
"""Stands for the end of a text in an n-gram and in a lexicon."""

SMALLEST = 1e-45
"""Stands for a probability that float32 rounds to zero: a lexicon may leave no other way."""

WIDEST = 1000
"""Texts that are followed where none of a lexicon's was among fewer."""


class NGram:
    """Probabilities of characters after others, from example texts.

    Interpolated Witten-Bell smoothing (Chen and Goodman 1998, section 2.6): what was never seen
    after four characters is looked for after three, and in the end all classes are equal.

    Attributes:
        order: Characters that are looked at, the one in question included.
    """

    def __init__(self, texts: Iterable[str], charset: Charset, order: int = 5) -> None:
        self.order = order
        self._classes = charset.classes
        self._after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            symbols = [*charset.encode("".join(c for c in text if not charset.unknown(c))), END]
            for place, symbol in enumerate(symbols):
                for start in range(max(0, place - order + 1), place + 1):
                    self._after[tuple(symbols[start:place])][symbol] += 1
        self._known: dict[tuple[int, ...], float] = {}

    def log_probability(self, text: tuple[int, ...], symbol: int) -> float:
        """Of a class, or END, behind the classes of a text."""
        context = text[-self.order + 1 :] if self.order > 1 else ()
        key = (*context, symbol)
        if key not in self._known:
            self._known[key] = math.log(self._probability(context, symbol))
        return self._known[key]

    def _probability(self, context: tuple[int, ...], symbol: int) -> float:
        shorter = self._probability(context[1:], symbol) if context else 1 / self._classes
        if context not in self._after:
            return shorter
        seen = self._after[context]
        total, kinds = seen.total(), len(seen)
        return (seen[symbol] + kinds * shorter) / (total + kinds)


class Lexicon:
    """The texts that can be read, as the classes that may follow each beginning.

    Attributes:
        unreadable: Texts with characters that the charset lacks; the search never finds them.
    """

    def __init__(self, texts: Iterable[str], charset: Charset) -> None:
        self._next: dict[tuple[int, ...], set[int]] = defaultdict(set)
        self.unreadable: list[str] = []
        for text in texts:
            if charset.unknown(text):
                self.unreadable.append(text)
                continue
            symbols = charset.encode(text)
            for place, symbol in enumerate([*symbols, END]):
                self._next[tuple(symbols[:place])].add(symbol)

    def __len__(self) -> int:
        return sum(END in following for following in self._next.values())

    def following(self, text: tuple[int, ...]) -> Set[int]:
        """The classes, or END, that come next in texts that begin with these."""
        return self._next.get(text, frozenset())


class Spelled(NamedTuple):
    """A text that beam search found.

    Attributes:
        classes: Of its characters.
        confidence: Its probability, over all alignments that were followed, in [0, 1].
        characters: For each character the largest probability that a frame gave it, in [0, 1].
    """

    classes: tuple[int, ...]
    confidence: float
    characters: list[float]


@dataclass
class _Prefix:
    """Log probabilities of a text's alignments so far, those that end in a blank apart.

    spoken is that of its characters in the language.
    """

    blank: float = NEVER
    other: float = NEVER
    characters: list[float] = field(default_factory=list)
    spoken: float = 0.0

    @property
    def both(self) -> float:
        return _add(self.blank, self.other)


@dataclass(frozen=True)
class BeamSearch:
    """How lines are decoded.

    Attributes:
        width: Texts that are followed at a time.
        lexicon: Nothing else is read; None: anything is.
        language: Says how likely a text is; None: nothing does.
        weight: Of the log probability of the language.
        bonus: Added for each character, in nats: a language makes long texts improbable.
        cutoff: Classes of a frame below this probability are not looked at; with a lexicon those
            that may follow are, however improbable.
    """

    width: int = 10
    lexicon: Lexicon | None = None
    language: NGram | None = None
    weight: float = 0.3
    bonus: float = 0.5
    cutoff: float = 1e-3

    def read(self, probabilities: np.ndarray) -> Spelled:
        """The best text for a line's own frames, probabilities (T, K).

        Where no text of a lexicon is among those followed to the end, more are followed; where
        there still is none, as none fits into the frames, nothing is read.
        """
        beam: dict[tuple[int, ...], _Prefix] = {(): _Prefix(blank=0.0)}
        for frame in np.log(np.maximum(probabilities.astype(np.float64), SMALLEST)):
            beam = self._step(beam, frame)
        ended = [text for text in beam if self._allows(text, END)]
        if not ended:
            wider = replace(self, width=WIDEST)
            return wider.read(probabilities) if self.width < WIDEST else Spelled((), 0.0, [])
        best = max(ended, key=lambda text: self._score(text, beam[text], ended=True))
        found = beam[best]
        return Spelled(best, min(1.0, math.exp(found.both)), found.characters)

    def _step(
        self, beam: dict[tuple[int, ...], _Prefix], frame: np.ndarray
    ) -> dict[tuple[int, ...], _Prefix]:
        likely = np.flatnonzero(frame >= math.log(self.cutoff)).tolist() or [int(frame.argmax())]
        grown: dict[tuple[int, ...], _Prefix] = defaultdict(_Prefix)
        for text, prefix in beam.items():
            for symbol in self._candidates(text, likely):
                self._extend(grown, text, prefix, symbol, float(frame[symbol]))
        kept = sorted(grown, key=lambda text: -self._score(text, grown[text]))[: self.width]
        return {text: grown[text] for text in kept}

    def _extend(
        self,
        grown: dict[tuple[int, ...], _Prefix],
        text: tuple[int, ...],
        prefix: _Prefix,
        symbol: int,
        log: float,
    ) -> None:
        """Go on from a text with one class of the next frame."""
        if symbol == BLANK:
            same = _arrive(grown[text], prefix.characters, prefix.spoken)
            same.blank = _add(same.blank, prefix.both + log)
            return
        if text and symbol == text[-1]:
            same = _arrive(grown[text], prefix.characters, prefix.spoken)
            same.other = _add(same.other, prefix.other + log)
            same.characters[-1] = max(same.characters[-1], math.exp(log))
            before = prefix.blank  # A letter twice takes a blank between.
        else:
            before = prefix.both
        if before == NEVER or not self._allows(text, symbol):
            return
        spoken = prefix.spoken
        if self.language:
            spoken += self.language.log_probability(text, symbol)
        longer = _arrive(grown[*text, symbol], [*prefix.characters, math.exp(log)], spoken)
        longer.other = _add(longer.other, before + log)

    def _candidates(self, text: tuple[int, ...], likely: Sequence[int]) -> Iterable[int]:
        """Classes to go on with: the likely ones, or all that a lexicon lets stand here."""
        if self.lexicon is None:
            return likely
        return {BLANK, *text[-1:], *self.lexicon.following(text)} - {END}

    def _allows(self, text: tuple[int, ...], symbol: int) -> bool:
        return self.lexicon is None or symbol in self.lexicon.following(text)

    def _score(self, text: tuple[int, ...], prefix: _Prefix, ended: bool = False) -> float:
        if not self.language:
            return prefix.both
        score = prefix.both + self.bonus * len(text) + self.weight * prefix.spoken
        if ended:
            score += self.weight * self.language.log_probability(text, END)
        return score


def _arrive(prefix: _Prefix, characters: Sequence[float], spoken: float) -> _Prefix:
    """A text that is reached once more, with the confidences on this way to it."""
    prefix.spoken = spoken
    known = prefix.characters or [0.0] * len(characters)
    prefix.characters = [max(pair) for pair in zip(known, characters, strict=True)]
    return prefix


def _add(one: float, other: float) -> float:
    """Logarithm of the sum of two probabilities given as logarithms."""
    high, low = max(one, other), min(one, other)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))
