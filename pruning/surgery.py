"""Cutting channels out of a recogniser, and keeping the constants they left behind.

Works on the VGG layout: convolution, BatchNorm, ReLU, now and then a pool, and an LSTM behind.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from crnn.checkpoint import recogniser_of
from crnn.networks.recogniser import INITIAL_GAMMA, Recogniser
from pruning.gammas import prunable

LSTM_INPUTS = ("rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse")
LSTM_BIASES = ("rnn.bias_ih_l0", "rnn.bias_ih_l0_reverse")


def cut(
    model: Recogniser, masks: Sequence[Tensor], means: Sequence[Tensor] | None = None
) -> Recogniser:
    """Build the compact network that keeps the masked channels.

    Args:
        model: The uncut network; left as it is.
        masks: One boolean (C_i,) mask for each BatchNorm in forward order; True keeps.
        means: Mean activation of every channel where the next layer reads it, as
            mean_activations gives them. The removed ones are folded into the running mean of the
            next BatchNorm, or into the input biases of the LSTM. None drops them.

    Returns:
        A new network. With removed activations constant it computes the same function up to the
        zero-padded border; with them zero, exactly the same.
    """
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if means is not None:
        _fold(tensors, model, masks, means)
    convolutions, norms = _layers(model)
    before = torch.ones(3, dtype=torch.bool)
    for convolution, norm, mask in zip(convolutions, norms, masks, strict=True):
        weight = tensors[f"{convolution}.weight"]
        tensors[f"{convolution}.weight"] = weight[mask][:, before]
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{part}"] = tensors[f"{norm}.{part}"][mask]
        before = mask
    for name in LSTM_INPUTS:
        tensors[name] = tensors[name][:, before]
    return recogniser_of(model.settings, model.classes, tensors)


def revive(model: Recogniser, masks: Sequence[Tensor]) -> None:
    """Give kept channels that have faded something to do again, without changing the function.

    Their gamma becomes the mean of their layer's, and what reads them starts at zero, as in
    function-preserving widening (Chen et al. 2016, arXiv:1511.05641). ReLU lets no gradient
    through where gamma and beta are zero, so that fine-tuning alone never brings them back.

    Args:
        model: Changed in place.
        masks: As for cut.
    """
    tensors = model.state_dict()  # Shares its memory with the model.
    convolutions, norms = _layers(model)
    readers = [[f"{name}.weight"] for name in convolutions[1:]] + [list(LSTM_INPUTS)]
    for norm, mask, names in zip(norms, masks, readers, strict=True):
        gamma, beta = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
        idle = mask & (gamma == 0) & (beta == 0)
        live = gamma[gamma != 0]
        gamma[idle] = live.abs().mean() if len(live) else INITIAL_GAMMA
        for name in names:
            tensors[name][:, idle] = 0


def _layers(model: Recogniser) -> tuple[list[str], list[str]]:
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return convolutions, list(prunable(model))


def _fold(
    tensors: dict[str, Tensor], model: Recogniser, masks: Sequence[Tensor], means: Sequence[Tensor]
) -> None:
    """Add what the removed channels contribute, taken as constant, to the layers behind them."""
    convolutions, norms = _layers(model)
    readers = zip(convolutions[1:], norms[1:], masks[:-1], means[:-1], strict=True)
    for convolution, norm, mask, mean in readers:
        kernel_sums = tensors[f"{convolution}.weight"][:, ~mask].sum((2, 3))
        tensors[f"{norm}.running_mean"] -= kernel_sums @ mean[~mask]
    for weight, bias in zip(LSTM_INPUTS, LSTM_BIASES, strict=True):
        tensors[bias] += tensors[weight][:, ~masks[-1]] @ means[-1][~masks[-1]]


@torch.inference_mode()
def mean_activations(model: Recogniser, images: Iterable[Tensor]) -> list[Tensor]:
    """Mean of every channel where the next layer reads it, pools included.

    Args:
        model: Evaluated with its running statistics.
        images: Batches (N, 3, 32, W), normalised.

    Returns:
        One (C_i,) tensor for each BatchNorm in forward order, over lines and positions.
    """
    convolutions = [m for m in model.cnn.modules() if isinstance(m, nn.Conv2d)]
    totals: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def add(index: int, activation: Tensor) -> None:
        summed = activation.double().sum((0, 2, 3))
        totals[index] = totals.get(index, torch.zeros_like(summed)) + summed
        counts[index] = counts.get(index, 0) + activation.numel() // activation.shape[1]

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, index=index: add(index, inputs[0]))
        for index, layer in enumerate(convolutions[1:])
    ]
    last = len(convolutions) - 1
    hooks.append(model.cnn.register_forward_hook(lambda _, __, output: add(last, output)))
    try:
        model.eval()
        for batch in images:
            model.cnn(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [(totals[i] / counts[i]).to(model.dtype) for i in range(len(convolutions))]
