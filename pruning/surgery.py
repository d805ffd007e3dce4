"""Cutting channels out of a recogniser, and keeping the constants they left behind."""

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crnn.checkpoint import recogniser_of
from crnn.data.images import HEIGHT
from crnn.errors import SettingsError
from crnn.networks.branches import last_norms, shortcuts_of
from crnn.networks.deploy import deployed
from crnn.networks.recogniser import INITIAL_GAMMA, Recogniser
from crnn.training import estimate_statistics
from pruning.coupling import LSTM, LSTM_INPUTS, Group, groups_of
from pruning.gammas import norms_of

NOISE = 0.1
"""Standard deviation of what is added to biases before a cut is proven."""

LSTM_BIASES = ("rnn.bias_ih_l0", "rnn.bias_ih_l0_reverse")

TOLERANCE = 1e-6
"""Largest difference of logits, in float64, between a masked network and its cut."""


def cut(
    model: Recogniser, masks: Sequence[Tensor], means: dict[str, Tensor] | None = None
) -> Recogniser:
    """Build the compact network that keeps the masked channels.

    Args:
        model: The uncut network; left as it is.
        masks: One boolean (C_i,) mask for each group in forward order; True keeps. Only a group
            that is a branch may go as a whole, which leaves the constant that it gave.
        means: Mean of every channel where a layer reads it, as mean_inputs gives them. What the
            removed ones add on the mean is folded into the running mean of the BatchNorm behind
            that layer, into its bias, or into the input biases of the LSTM. None drops it.

    Returns:
        A new network. With removed activations zero it computes exactly the same function.
    """
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = groups_of(model)
    if means is not None:
        behind = _norms_behind(model)
        for group, mask in zip(groups, masks, strict=True):
            _fold(tensors, group, mask, means, behind)
    for group, mask in zip(groups, masks, strict=True):
        for (name, axis), channels in group.axes.items():
            kept = mask[channels].nonzero().flatten()
            tensors[name] = tensors[name].index_select(axis, kept)
    for group, mask in zip(groups, masks, strict=True):
        if group.branch and not mask.any():
            _drop_branch(tensors, model, group.branch)
    return recogniser_of(model.settings, model.classes, tensors)


def revive(model: Recogniser, masks: Sequence[Tensor]) -> None:
    """Give kept channels that have faded something to do again, without changing the function.

    Their gammas become the mean of their BatchNorm's, and what reads them starts at zero, as in
    function-preserving widening (Chen et al. 2016, arXiv:1511.05641). ReLU lets no gradient
    through where gamma and beta are zero, so that fine-tuning alone never brings them back. A
    channel with a beta left, as any method but auto leaves it, still gives what may count, and
    stays as it is.

    Args:
        model: Changed in place.
        masks: As for cut.
    """
    tensors = model.state_dict()  # Shares its memory with the model.
    for group, mask in zip(groups_of(model), masks, strict=True):
        idle = mask.clone()
        for name, channels in group.norms.items():
            gamma, beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            idle[channels[(gamma != 0) | (beta != 0)]] = False
        for name, channels in group.norms.items():
            gamma = tensors[f"{name}.weight"]
            live = gamma[gamma != 0]
            gamma[idle[channels]] = live.abs().mean() if len(live) else INITIAL_GAMMA
        for (name, axis), channels in group.axes.items():
            if axis == 1:
                tensors[name][:, idle[channels]] = 0


def refuse_uncuttable(model: Recogniser) -> None:
    """Prove that a network computes the same without channels that have faded.

    Raises:
        SettingsError: It does not: its channels are coupled in a way that the dependency graph
            cannot follow, or something gives them a value that no BatchNorm scales.
    """
    if shortcuts_of(model):
        raise SettingsError(
            "the network of baseline.checkpoint is one whose branches have gone in a cut, and no"
            " BatchNorm scales the constants they left; start from the network before that cut"
        )
    try:
        difference = _difference_without_half(model)
    except Exception as error:  # Torch-Pruning raises whatever it stumbles over.
        raise _uncuttable(
            model, f"its channels are coupled as no rule here follows ({error})"
        ) from error
    if not difference < TOLERANCE:
        raise _uncuttable(
            model, f"without channels whose scales are zero its logits change by {difference:.1g}"
        )


def _drop_branch(tensors: dict[str, Tensor], model: Recogniser, block: str) -> None:
    """Leave of a residual block's tensors its shortcut's, and what its branch makes of nothing."""
    norm = last_norms(model)[block]
    mean, variance = tensors[f"{norm}.running_mean"], tensors[f"{norm}.running_var"]
    scale = tensors[f"{norm}.weight"] / (variance + norms_of(model)[norm].eps).sqrt()
    constant = tensors[f"{norm}.bias"] - scale * mean
    for name in [name for name in tensors if name.startswith(f"{block}.")]:
        if not name.startswith(f"{block}.downsample."):
            del tensors[name]
    tensors[f"{block}.constant"] = constant


def _uncuttable(model: Recogniser, reason: str) -> SettingsError:
    return SettingsError(f"model.backbone {model.settings.backbone} cannot be cut: {reason}")


def _difference_without_half(model: Recogniser) -> float:
    """Largest change of a logit, in float64, when half of the channels, all faded, are cut.

    So are half of the branches that can go as a whole. Of the form that ships as well, where the
    network has one.
    """
    chance = torch.Generator().manual_seed(0)
    masked = _disturbed(copy.deepcopy(model).cpu().double(), chance)
    masks = []
    norms = norms_of(masked)
    for group in groups_of(model):
        mask = torch.rand(group.size, generator=chance) < 0.5
        mask[0] = True
        mask &= group.branch is None or bool(torch.rand(1, generator=chance) < 0.5)
        for name, channels in group.norms.items():
            for parameter in (norms[name].weight, norms[name].bias):
                parameter.data[~mask[channels]] = 0
        masks.append(mask)
    image = torch.rand(1, 3, HEIGHT, 32, generator=chance).double()
    compact = cut(masked, masks, mean_inputs(masked, [image]))
    with torch.inference_mode():
        expected = masked(image)
        forms = [form(image) for form in (compact, deployed(compact)) if form]
        return max(float((expected - logits).abs().max()) for logits in forms)


def _disturbed(model: Recogniser, chance: torch.Generator) -> Recogniser:
    """Make a network one whose every part counts, as in a trained one.

    In a fresh one constants are zero, and signals so faint that what is cut wrongly goes unseen.
    """
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.data += NOISE * torch.randn(parameter.shape, generator=chance).double()
    for norm in norms_of(model).values():
        nn.init.ones_(norm.weight)
    estimate_statistics(model, [torch.rand(4, 3, HEIGHT, 64, generator=chance).double() * 2 - 1])
    return model


def _fold(
    tensors: dict[str, Tensor],
    group: Group,
    mask: Tensor,
    means: dict[str, Tensor],
    behind: dict[str, str],
) -> None:
    """Add what removed channels contribute on the mean to what stands behind them."""
    for (tensor, axis), channels in group.axes.items():
        layer, removed = tensor.rpartition(".")[0], ~mask[channels]
        if axis != 1 or not removed.any():
            continue
        added = tensors[tensor][:, removed].flatten(1) @ means[layer][removed].flatten()
        if layer == LSTM:
            tensors[LSTM_BIASES[LSTM_INPUTS.index(tensor)]] += added
        elif layer in behind:
            tensors[f"{behind[layer]}.running_mean"] -= added
        elif f"{layer}.bias" in tensors:
            tensors[f"{layer}.bias"] += added


def _norms_behind(model: Recogniser) -> dict[str, str]:
    """For each convolution the BatchNorm that reads its output, by their names."""
    made_by: dict[int, str] = {}
    behind: dict[str, str] = {}
    outputs = []  # Kept, so that no later tensor gets the identity of an earlier one.
    hooks = []

    def made(name: str, output: Tensor) -> None:
        made_by[id(output)] = name
        outputs.append(output)

    def read(name: str, image: Tensor) -> None:
        if id(image) in made_by:
            behind[made_by[id(image)]] = name

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_hook(lambda _, __, out, n=name: made(n, out)))
        elif isinstance(layer, nn.BatchNorm2d):
            hooks.append(
                layer.register_forward_pre_hook(lambda _, given, n=name: read(n, given[0]))
            )
    try:
        with torch.inference_mode():
            model.eval().cnn(torch.zeros(1, 3, HEIGHT, 32, dtype=model.dtype, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return behind


@torch.inference_mode()
def mean_inputs(model: Recogniser, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean of every channel where a convolution or the LSTM reads it.

    A convolution's is for each tap of its kernel, over its outputs: with 32 rows reduced to one,
    much of what a tap reads is padding.

    Args:
        model: Evaluated with its running statistics.
        images: Batches (N, 3, 32, W), normalised.

    Returns:
        By the name of the layer, (channels it reads, kernel height, kernel width), and
        (channels,) for the LSTM, over lines and positions.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, summed: Tensor, output: Tensor) -> None:
        totals[name] = totals.get(name, torch.zeros_like(summed)) + summed
        counts[name] = counts.get(name, 0) + output.numel() // output.shape[1]

    hooks = [
        layer.register_forward_hook(
            lambda layer, given, output, n=name: add(
                n, _sums_by_tap(layer, given[0], output), output
            )
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    hooks.append(
        model.cnn.register_forward_hook(
            lambda _, __, output: add(LSTM, output.double().sum((0, 2, 3)), output)
        )
    )
    try:
        model.eval()
        for batch in images:
            model.cnn(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).to(model.dtype).cpu() for name, total in totals.items()}


def _sums_by_tap(layer: nn.Conv2d, given: Tensor, output: Tensor) -> Tensor:
    """Sum of what each tap of a kernel reads, padding included, (C, kh, kw), float64.

    Args:
        layer: The convolution.
        given: Its input (N, C, H, W).
        output: Its output (N, C', H', W').
    """
    sides, taps = [], []
    for axis in (1, 0):  # Padding is told from the last axis on.
        size, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        span = stride * (output.shape[2 + axis] - 1) + 1
        missing = span + dilation * (size - 1) - given.shape[2 + axis]
        # timm's layers of padding "same" have none of their own: they lay out their input first.
        own = 0 if isinstance(layer.padding, str) else int(layer.padding[axis])
        before = own or max(missing, 0) // 2
        sides += [before, missing - before]
        taps.append(
            [slice(start, start + span, stride) for start in range(0, size * dilation, dilation)]
        )
    padded = F.pad(given.double(), sides)
    sums = [padded[..., row, column].sum((0, 2, 3)) for row in taps[1] for column in taps[0]]
    return torch.stack(sums, 1).view(-1, *layer.kernel_size)
