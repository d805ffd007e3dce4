"""Small real parts shared by the tests: rendered lines on disk, and a state folder of their own."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch

from crnn.charset import Charset
from crnn.data.batches import Lines
from crnn.data.images import fit_line
from crnn.data.render import render_line
from crnn.data.sources import Rendered
from crnn.networks.heads import HeadWithRows, two_layer_head
from crnn.networks.recogniser import Recogniser
from crnn.settings import ModelSettings, TextSettings

DIGITS = TextSettings(alphabet="0123456789", min_length=1, max_length=4)

TIMM = ["mobilenetv3_small_100", "mobilenetv3_large_100", "ghostnet_100", "resnet34", "repvgg_a0"]

CORES = sorted(os.sched_getaffinity(0))
"""All that tests may use."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Pipelines first: they take longest, and what is short fills the gaps at the end.

    Those of a file far from each other: side by side they would wait for what they share.
    """
    items.sort(key=lambda item: (item.path.parent.name != "flows", crc32(item.nodeid.encode())))


@pytest.fixture(autouse=True)
def _state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRNN_SLIM_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_core() -> Iterator[None]:
    """Where tests share the machine, each process of pytest and what it starts stays on a core.

    Networks this small gain nothing from a second one, and two threads that wait for each other
    while something else has their cores cost a third more: here there is one, with xdist or not.
    """
    torch.set_num_threads(1)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    with on_cores([CORES[int(worker.removeprefix("gw")) % len(CORES)]] if worker else CORES):
        yield


@contextmanager
def on_cores(cores: Iterable[int]) -> Iterator[None]:
    """Inside, this process and those that it starts have these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def rendered_lines(count: int, seed: int = 0, text: TextSettings = DIGITS) -> Lines:
    """Rendered samples ready for training."""
    source = Rendered(count, seed, text)
    widths = [fit_line(source.image(i), 320).width for i in range(count)]
    charset = Charset(text.alphabet)
    return Lines(source, np.arange(count), np.array(widths, np.int32), charset, 320)


@pytest.fixture(scope="session")
def lines() -> Lines:
    return rendered_lines(40)


def random_recogniser(
    width: float = 0.1, classes: int = 11, seed: int = 0, backbone: str = "vgg13"
) -> Recogniser:
    """A float64 network whose BatchNorms and head are not at their start, which hides mistakes."""
    torch.manual_seed(seed)
    settings = ModelSettings(backbone=backbone, width=width, hidden=8)
    model = Recogniser(settings, classes).double().eval()
    torch.nn.init.normal_(model.head.bias, 0.0, 0.1)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.weight, 0.0, 1.0)
            torch.nn.init.normal_(layer.bias, 0.0, 0.5)
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.5, 2)
    return model


HEADS = [(None, 0), (3, 0), (3, 2)]
"""Rank and rows of each kind of head."""


def give_head(model: Recogniser, rank: int | None, rows: int = 0) -> None:
    """Put a random head of that kind on the network; None leaves its own."""
    features = 2 * model.rnn.hidden_size
    if rank is None:
        return
    if rows:
        head = HeadWithRows(features, rank, model.classes, rows)
        head.classes = torch.arange(rows) * 3 + 1
        model.head = head.to(model.dtype)
    else:
        model.head = two_layer_head(features, rank, model.classes).to(model.dtype)


@pytest.fixture
def label_folder(tmp_path: Path) -> Path:
    """A data root with train.txt (24 lines), val.txt (8) and charset.txt of rendered digits."""
    root = tmp_path / "lines"
    (root / "images").mkdir(parents=True)
    for split, numbers in (("train", range(24)), ("val", range(24, 32))):
        entries = []
        for number in numbers:
            image, label = render_line(7, number, DIGITS)
            image.save(root / "images" / f"{number}.png")
            entries.append(f"images/{number}.png\t{label}\n")
        (root / f"{split}.txt").write_text("".join(entries), encoding="utf-8")
    (root / "charset.txt").write_text("0123456789", encoding="utf-8")
    return root
