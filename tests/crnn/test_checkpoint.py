import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, load_checkpoint, load_run, save_checkpoint, save_run
from crnn.data.batches import Lines
from crnn.errors import CheckpointError
from crnn.networks.recogniser import Recogniser
from crnn.settings import ModelSettings, TrainSettings
from crnn.training import fit, start
from pruning.gammas import absolute_gammas
from pruning.selection import keep_masks
from pruning.settings import PruneSettings
from pruning.surgery import cut
from tests.conftest import HEADS, give_head

DIGITS = Charset("0123456789")


def small(seed: int = 0, head_rank: int | None = None, head_rows: int = 0) -> Recogniser:
    torch.manual_seed(seed)
    model = Recogniser(ModelSettings(width=0.1, hidden=8), DIGITS.classes).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0, 1)
    give_head(model, head_rank, head_rows)
    return model


@pytest.mark.parametrize("ratio", [0.0, 0.62, 0.87])
def test_a_network_of_any_widths_comes_back_to_the_same_bits(tmp_path: Path, ratio: float) -> None:
    model = small()
    model = cut(model, keep_masks(absolute_gammas(model), ratio, PruneSettings())).eval()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(model, DIGITS, 160, "prune"))
    written = path.read_bytes()
    for _ in range(5):
        save_checkpoint(path, Checkpoint(model, DIGITS, 160, "prune"))
        assert path.read_bytes() == written
    loaded = load_checkpoint(path)
    assert (loaded.charset, loaded.max_width, loaded.stage) == (DIGITS, 160, "prune")
    images = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(model(images), loaded.model(images))


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_a_head_of_two_layers_comes_back_from_its_keys_alone(tmp_path: Path, rank: int) -> None:
    model = small(head_rank=rank)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(model, DIGITS, 160, "prune"))
    loaded = load_checkpoint(path).model
    shapes = {n: tuple(t.shape) for n, t in loaded.head.state_dict().items()}
    assert shapes == {"0.weight": (rank, 16), "1.weight": (11, rank), "1.bias": (11,)}
    images = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(model(images), loaded(images))


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps({"weights": [1, 2]}))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_checkpoint(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of this program"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("head.bias"), "missing tensors"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "unknown"),
        (lambda t, m: t.update({"head.bias": torch.zeros(10**6)}), "11 classes"),
        (lambda t, m: t.update({"cnn.1.weight": torch.zeros(3)}), "do not fit"),
        (lambda t, m: t.update({"cnn.1.weight": torch.zeros(3).int()}), "of torch.int32, not"),
        (lambda t, m: t.update({"cnn.0.weight": torch.zeros(0, 3, 3, 3)}), "at most"),
        (lambda t, m: t.update({"head.weight": torch.zeros(10, 16)}), "11 classes"),
        (lambda t, m: t.update({"head.bias": torch.zeros(1)}), "11 classes"),
        (lambda t, m: t.update({"head.weight": torch.zeros(11, 14)}), "do not fit"),
        (lambda t, m: t.update({"rnn.weight_ih_l0": torch.zeros(3, 51)}), "do not fit"),
        (lambda t, m: t.update({"rnn.weight_ih_l0": torch.zeros(28, 51)}), "do not fit"),
        (lambda t, m: m.update(charset="01"), "3 classes"),
        (lambda t, m: m.update(charset="00"), "metadata"),
        (lambda t, m: m.update(model="{}x"), "metadata"),
        (lambda t, m: m.pop("geometry"), "metadata"),
    ],
)
def test_tampered_checkpoints_are_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    refuse_tampered(tmp_path / "model.safetensors", small(), change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("head.1.bias"), "missing tensors"),
        (lambda t, m: t.update({"head.weight": torch.zeros(11, 16)}), "unknown"),
        (lambda t, m: t.update({"head.2.weight": torch.zeros(11, 11)}), "unknown"),
        (lambda t, m: t.update({"head.0.weight": torch.zeros(12, 16)}), "at most"),
        (lambda t, m: t.update({"head.0.weight": torch.zeros(10**6, 16)}), "at most"),
        (lambda t, m: t.update({"head.0.weight": torch.zeros(0, 16)}), "at most"),
        (lambda t, m: t.update({"head.0.weight": torch.zeros(4, 15)}), "do not fit"),
        (lambda t, m: t.update({"head.0.weight": torch.zeros(5, 16)}), "do not fit"),
        (lambda t, m: t.update({"head.1.weight": torch.zeros(1, 4)}), "11 classes"),
        (lambda t, m: t.update({"head.1.bias": torch.zeros(1)}), "11 classes"),
        (lambda t, m: m.update(charset="0123456789A"), "12 classes"),
    ],
)
def test_tampered_heads_of_two_layers_are_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    refuse_tampered(tmp_path / "model.safetensors", small(head_rank=4), change, message)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_head_with_rows_comes_back_from_its_keys_alone(tmp_path: Path, rows: int) -> None:
    model = small(head_rank=3, head_rows=rows)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(model, DIGITS, 160, "prune"))
    loaded = load_checkpoint(path).model
    assert loaded.head.classes.tolist() == [1, 4, 7, 10][:rows]
    images = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(model(images), loaded(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("head.classes"), "missing tensors"),
        (lambda t, m: t.update({"head.classes": torch.tensor([1, 11])}), "do not fit"),
        (lambda t, m: t.update({"head.classes": torch.tensor([-1, 4])}), "do not fit"),
        (lambda t, m: t.update({"head.classes": torch.tensor([1])}), "do not fit"),
        (lambda t, m: t.update({"head.classes": torch.tensor(1)}), "at most"),
        (lambda t, m: t.update({"head.classes": torch.zeros(2)}), "of torch.float32, not"),
        (lambda t, m: t.update({"head.classes": torch.zeros(2).int()}), "of torch.int32, not"),
        (lambda t, m: t.update({"head.rows.weight": torch.zeros(12, 16)}), "at most"),
        (lambda t, m: t.update({"head.rows.weight": torch.zeros(())}), "at most"),
        (lambda t, m: t.update({"head.low_rank.1.bias": torch.zeros(1)}), "11 classes"),
    ],
)
def test_tampered_heads_with_rows_are_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    model = small(head_rank=3, head_rows=2)
    refuse_tampered(tmp_path / "model.safetensors", model, change, message)


def refuse_tampered(path: Path, model: Recogniser, change, message: str) -> None:  # type: ignore[no-untyped-def]
    save_checkpoint(path, Checkpoint(model, DIGITS, 160, "baseline"))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    ours = json.loads(metadata["crnn-slim"])
    change(tensors, ours)
    save_file(tensors, path, {"crnn-slim": json.dumps(ours)})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("head", HEADS)
def test_a_resumed_training_ends_in_the_same_bits(
    tmp_path: Path, lines: Lines, head: tuple[int | None, int]
) -> None:
    settings = TrainSettings(epochs=3, batch_size=8)
    straight = start(small(0, *head), settings, seed=5)
    fit(straight, lines, settings)

    path = tmp_path / "state.safetensors"
    halted = start(small(0, *head), settings, seed=5)

    def halt(_: dict[str, float]) -> None:
        save_run(path, halted)
        if halted.epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(halted, lines, settings, on_epoch=halt)
    resumed = load_run(path, small(9, *head), settings)
    assert (resumed.epoch, resumed.seed) == (2, 5)
    fit(resumed, lines, settings)

    expected = straight.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
