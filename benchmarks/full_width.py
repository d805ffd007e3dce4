"""The article's network, full width and 5,963 classes, on receipts: what its cuts lose.

    .venv/bin/python -m benchmarks.full_width params/sroie.yaml    # hours; finished stages are kept

Takes a params file, and section.key=value for what shall differ from it. The charset of its data is
filled up with Chinese characters that no label has: they cost what they cost the article, and the
network has to learn not to read them. Cut are the CNN alone, at 0.62 and 0.87, and, at 0.62, the
LSTM and the head as well, so that the whole network has at most 1.2 M parameters.
"""

import sys
from itertools import count, islice
from pathlib import Path

from benchmarks.backbones import table
from benchmarks.slimming import frontier
from crnn.charset import Charset
from crnn.errors import DataError
from crnn.files import write_atomic
from flows import project
from flows.definitions import given_charset
from flows.experiment import load_experiment

CHARACTERS = 5962
"""The article's classes without the blank."""

FIRST_IDEOGRAPH = 0x4E00
ARTICLE = ["model.width=1", "model.hidden=48", "quantize=null"]
BEYOND_THE_CNN = [
    "ratios=[0.62]",
    "prune.lstm_ratio=0.61",
    "prune.head_rank=2",
    "prune.head_rows=65",  # The blank, and as many as the receipts' charset has.
]


def main() -> None:
    """Compute both frontiers, and print their points as one table."""
    params, *changed = sys.argv[1:]
    charset = given_charset(load_experiment(Path(params), changed).data)
    if charset is None:
        raise DataError(f"{params} names no data.charset, and only one in a file can be filled up")
    more = [*ARTICLE, f"data.charset={_filled(charset)}", *changed]
    cnn = frontier(params, ["name=full-width", "ratios=[0.62,0.87]"], more, [0])
    cut = frontier(params, ["name=full-width-all", *BEYOND_THE_CNN], more, [0])[1:]
    print("\n".join(table({"CNN cut": cnn, "LSTM and head cut as well": cut})))


def _filled(charset: Charset) -> Path:
    """File with the charset and as many ideographs as it lacks of the article's number."""
    ideographs = (
        chr(code) for code in count(FIRST_IDEOGRAPH) if chr(code) not in charset.characters
    )
    lacking = islice(ideographs, CHARACTERS - len(charset.characters))
    path = project.home() / "benchmarks" / f"charset-{CHARACTERS}.txt"
    write_atomic(path, (charset.characters + "".join(lacking)).encode())
    return path


if __name__ == "__main__":
    main()
