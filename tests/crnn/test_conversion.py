"""State dicts of the article's layout, trained elsewhere."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from crnn.charset import Charset
from crnn.conversion import convert
from crnn.errors import CheckpointError
from crnn.networks.recogniser import Recogniser
from crnn.networks.vgg import vgg13
from crnn.settings import ModelSettings
from tests.conftest import random_recogniser

CHARSET = Charset("0123456789")


class Elsewhere(nn.Module):
    """The article's modules under names of its kind: backbone.feature, neck, head.fc."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.feature, channels = vgg13(0.1)
        self.neck = nn.Module()
        self.neck.lstm = nn.LSTM(channels, 8, num_layers=2, bidirectional=True)
        self.head = nn.Module()
        self.head.fc = nn.Linear(16, CHARSET.classes)

    def forward(self, images: Tensor) -> Tensor:
        frames = self.backbone.feature(images).squeeze(2).permute(2, 0, 1)
        logits: Tensor = self.head.fc(self.neck.lstm(frames)[0])
        return logits


@pytest.fixture
def elsewhere() -> Elsewhere:
    torch.manual_seed(3)
    return Elsewhere().eval()


def own_name(name: str) -> str:
    """The name that a tensor has in this program's checkpoints."""
    part = {"backbone.feature": "cnn", "neck.lstm": "rnn", "head.fc": "head"}
    return next(name.replace(old, new) for old, new in part.items() if name.startswith(old))


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "plain.pth": torch.save,
    "wrapped.pth": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
    "parallel.pth": lambda tensors, path: torch.save(
        {f"module.{name}": tensor for name, tensor in tensors.items()}, path
    ),
    "own.pth": lambda tensors, path: torch.save(
        {own_name(name): tensor for name, tensor in tensors.items()}, path
    ),
    "plain.safetensors": save_file,
}


@pytest.mark.parametrize("name", SAVERS)
def test_a_network_from_elsewhere_reads_as_it_did(
    elsewhere: Elsewhere, tmp_path: Path, name: str
) -> None:
    SAVERS[name](elsewhere.state_dict(), tmp_path / name)
    converted = convert(tmp_path / name, CHARSET, 320)
    images = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        assert torch.allclose(converted.model(images), elsewhere(images), atol=1e-6)
    assert (converted.max_width, converted.charset) == (320, CHARSET)


def test_a_network_in_half_precision_reads_in_full(elsewhere: Elsewhere, tmp_path: Path) -> None:
    elsewhere.half()
    torch.save(elsewhere.state_dict(), tmp_path / "half.pth")
    images = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        found = convert(tmp_path / "half.pth", CHARSET, 320).model(images)
        assert torch.allclose(found, elsewhere.float()(images), atol=1e-6)


def test_what_does_not_fit_is_listed(elsewhere: Elsewhere, tmp_path: Path) -> None:
    tensors = elsewhere.state_dict()
    path = tmp_path / "other.pth"
    torch.save({**tensors, "neck.attention.query": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"no place in a VGG13 CRNN: neck\.attention\.query;"):
        convert(path, CHARSET, 320)
    torch.save({n: t for n, t in tensors.items() if "feature.0." not in n}, path)
    with pytest.raises(CheckpointError, match=r"missing tensors \['cnn\.0\.weight'\]"):
        convert(path, CHARSET, 320)
    torch.save({n: t for n, t in tensors.items() if "lstm" not in n}, path)
    with pytest.raises(CheckpointError, match="has no LSTM"):
        convert(path, CHARSET, 320)
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match="has 11 rows, but the charset makes 4 classes"):
        convert(path, Charset("abc"), 320)


def test_an_lstm_that_no_recogniser_may_have_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "wide.pth"
    torch.save({"lstm.weight_hh_l0": torch.zeros(4 * 2048, 2048)}, path)
    with pytest.raises(CheckpointError, match=r"less than or equal to 1024$"):
        convert(path, CHARSET, 320)


def test_a_dict_without_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbered.pth"
    torch.save({0: torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="names with tensors are needed"):
        convert(path, CHARSET, 320)


@pytest.mark.parametrize(
    "content", [b"", b".", b"PK\x03\x04 torn", pickle.dumps(random_recogniser)]
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no plain state dict"):
        convert(path, CHARSET, 320)


def test_a_whole_pickled_model_is_refused_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(Recogniser(ModelSettings(width=0.1, hidden=8), 11), path)
    with pytest.raises(CheckpointError, match="is no plain state dict"):
        convert(path, CHARSET, 320)
