"""Cutting hidden units out of the LSTM: which go, what says the same without them, the cut itself.

A unit is one number of the hidden state of one layer and direction. nn.LSTM has one hidden size,
so every layer and direction loses as many.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from crnn.checkpoint import recogniser_of
from crnn.networks.recogniser import Recogniser
from pruning.head import head_readers, whole_weight
from pruning.moments import Moments, Sums
from pruning.settings import units_removed

DIRECTIONS = ("", "_reverse")
GATES = 4
"""Rows of a unit in each weight and bias: input, forget, cell, output."""


def keep_units(model: Recogniser, ratio: float) -> Tensor:
    """Keep the hidden units of the largest magnitude in every layer and direction.

    Args:
        model: Left as it is.
        ratio: Share of the units to remove, in [0, 1); floor(hidden x ratio) go, ties by index.

    Returns:
        Boolean (layers, 2, hidden); True keeps. A higher ratio keeps a subset of what a lower one
        keeps.
    """
    sizes = magnitudes(model)
    count = units_removed(sizes.shape[2], ratio)
    return torch.ones_like(sizes, dtype=torch.bool).scatter(
        2, sizes.argsort(dim=2, stable=True)[..., :count], False
    )


def magnitudes(model: Recogniser) -> Tensor:
    """L2 norm of all weights and biases that go with each hidden unit, (layers, 2, hidden).

    The groups of Intrinsic Sparse Structures (Wen et al. 2018, arXiv:1709.05027): a unit's rows of
    the four gates, its column of the recurrent weight, and the columns of the next layer or the
    head that read it. Deviations: biases are counted; the network was not trained with a group
    penalty; units are ranked within their layer and direction, which all lose as many.
    """
    tensors = {name: tensor.double() for name, tensor in model.state_dict().items()}
    layers, hidden = model.rnn.num_layers, model.rnn.hidden_size
    squares = torch.zeros(layers, len(DIRECTIONS), hidden, dtype=torch.double)
    for layer, direction, cell in _cells(model):
        for part in ("weight_ih", "bias_ih", "bias_hh"):
            rows = tensors[f"rnn.{part}_{cell}"].square().view(GATES, hidden, -1)
            squares[layer, direction] += rows.sum((0, 2))
        recurrent = tensors[f"rnn.weight_hh_{cell}"].square().view(GATES, hidden, hidden).sum(0)
        # What a unit tells itself is in its row and in its column, and counts once.
        squares[layer, direction] += recurrent.sum(0) + recurrent.sum(1) - recurrent.diagonal()
    for layer in range(layers):
        for reader in _readers(model, layer):
            squares[layer] += tensors[reader].square().sum(0).view(len(DIRECTIONS), hidden)
    return squares.sqrt()


def cut_units(
    model: Recogniser, masks: Tensor, outputs: Sequence[Moments] | None = None
) -> Recogniser:
    """Build the network that keeps the masked hidden units.

    Args:
        model: Left as it is.
        masks: Boolean (layers, 2, hidden), as many True in every layer and direction.
        outputs: Of every layer, as outputs_of gives them. All that reads a removed unit, its own
            layer, the next and the head, gets instead what the kept units there say of it by least
            squares: in its weights and its bias. None drops what was said.

    Returns:
        A new network. Where removed units say zero throughout, or, if outputs are given, the same
        affine function of the kept ones, it computes what the model does, but for the first frame:
        before it an LSTM remembers zero, whatever its units say.
    """
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if outputs is not None:
        _fold(tensors, model, masks, outputs)
    for layer, direction, cell in _cells(model):
        kept = masks[layer, direction]
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            tensors[f"rnn.{part}_{cell}"] = tensors[f"rnn.{part}_{cell}"][kept.repeat(GATES)]
        tensors[f"rnn.weight_hh_{cell}"] = tensors[f"rnn.weight_hh_{cell}"][:, kept]
    for layer in range(model.rnn.num_layers):
        for reader in _readers(model, layer):
            tensors[reader] = tensors[reader][:, masks[layer].flatten()]
    return recogniser_of(model.settings, model.classes, tensors)


def _fold(
    tensors: dict[str, Tensor], model: Recogniser, masks: Tensor, outputs: Sequence[Moments]
) -> None:
    """Let all that reads removed units read the kept ones in their place."""
    hidden = model.rnn.hidden_size
    for layer, direction, cell in _cells(model):
        own = outputs[layer].of(slice(direction * hidden, (direction + 1) * hidden))
        told = _reread(tensors, f"rnn.weight_hh_{cell}", masks[layer, direction], own)
        tensors[f"rnn.bias_hh_{cell}"] += told
        if layer > 0:
            below = outputs[layer - 1]
            told = _reread(tensors, f"rnn.weight_ih_{cell}", masks[layer - 1].flatten(), below)
            tensors[f"rnn.bias_ih_{cell}"] += told
    kept = masks[-1].flatten()
    told = whole_weight(model)[:, ~kept] @ outputs[-1].predict(kept)[1]
    for reader in head_readers(model):
        _reread(tensors, reader, kept, outputs[-1])
    *_, bias = model.head.state_dict()
    tensors[f"head.{bias}"] += told.to(tensors[f"head.{bias}"])


def _reread(tensors: dict[str, Tensor], name: str, kept: Tensor, outputs: Moments) -> Tensor:
    """Add to the kept columns of a weight what the removed ones read of them, as outputs tell.

    Returns:
        What the removed ones read besides, a constant for each row.
    """
    weight, bias = outputs.predict(kept)
    removed = tensors[name][:, ~kept].double()
    tensors[name][:, kept] += (removed @ weight).to(tensors[name])
    return (removed @ bias).to(tensors[name])


def _cells(model: Recogniser) -> Iterator[tuple[int, int, str]]:
    """Layer, direction and the end of the parameter names of both: l0, l0_reverse, l1, ..."""
    for layer in range(model.rnn.num_layers):
        for direction, suffix in enumerate(DIRECTIONS):
            yield layer, direction, f"l{layer}{suffix}"


def _readers(model: Recogniser, layer: int) -> list[str]:
    """Weights whose columns (2 x hidden, forward first) read the outputs of a layer."""
    if layer + 1 < model.rnn.num_layers:
        return [f"rnn.weight_ih_l{layer + 1}{suffix}" for suffix in DIRECTIONS]
    return head_readers(model)


@torch.inference_mode()
def outputs_of(model: Recogniser, images: Iterable[Tensor]) -> list[Moments]:
    """What each layer says over lines and frames, 2 x hidden numbers, forward first.

    Args:
        model: Evaluated with its running statistics.
        images: Batches (N, 3, 32, W), normalised.
    """
    layers = [_layer(model.rnn, index) for index in range(model.rnn.num_layers)]
    sums = [Sums(2 * model.rnn.hidden_size, model.device) for _ in layers]
    model.eval()
    for batch in images:
        frames = model.features(batch)
        for layer, said in zip(layers, sums, strict=True):
            frames, _ = layer(frames)
            said.add(frames)
    return [said.moments() for said in sums]


def _layer(lstm: nn.LSTM, index: int) -> nn.LSTM:
    """One layer, both directions, as an LSTM of its own: nn.LSTM shows the last outputs alone."""
    here = f"_l{index}"
    tensors = {n.replace(here, "_l0"): t for n, t in lstm.state_dict().items() if here in n}
    weight = tensors["weight_ih_l0"]
    layer = nn.LSTM(weight.shape[1], lstm.hidden_size, bidirectional=True).to(weight)
    layer.load_state_dict(tensors)
    return layer
