"""One training on several processes, each with its share of every batch (torch.distributed).

A training is the same up to rounding however many processes it has: the shares of a batch are
padded to one width, losses and gradients are means over the whole batch, and so are the statistics
of BatchNorm. Without a process group all of this does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from crnn.devices import best_device

SILENCE = timedelta(minutes=10)
"""How long the others wait for a process that is there and does not answer."""


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0; the first one writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def group(leads: bool) -> Iterator[None]:
    """Inside, this process and those that launchers started beside it train together.

    Args:
        leads: Whether this is the machine that reports and writes: the first rank is there, where
            launchers number machines as they come.
    """
    device = best_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, count = next(rendezvous("env://", timeout=SILENCE))
    if leads and os.environ["LOCAL_RANK"] == "0":
        store.set("first", str(number))
    number = (number - int(store.get("first"))) % count
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=number,
        world_size=count,
        timeout=SILENCE,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first(value: Any) -> Any:
    """What the first process has, in every process; it is pickled on its way."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def own_share(size: int) -> slice:
    """The part of a batch of so many lines that this process computes.

    Of a batch that is smaller than the group every process computes all: their mean is the same.
    (BatchNorm's running variance, which is corrected for the number of values, takes it for more.)
    """
    count, number = processes(), rank()
    if size < count:
        return slice(None)
    return slice(size * number // count, size * (number + 1) // count)


def weight(amount: float, device: torch.device) -> float:
    """What a mean over this process's share counts for in the mean over the whole batch.

    Args:
        amount: Of what the share's mean was taken over: lines, or frames.
        device: Where the network is.

    Returns:
        The amount over the processes' mean amount.
    """
    if not dist.is_initialized():
        return 1.0  # Without waiting for the device.
    return amount / float(mean(torch.tensor(float(amount), device=device)))


def mean(value: Tensor) -> Tensor:
    """Mean over the processes, without gradients."""
    return _reduced(value, dist.ReduceOp.SUM) / processes()


def maximum(value: Tensor) -> Tensor:
    """Largest of each element over the processes, without gradients."""
    return _reduced(value, dist.ReduceOp.MAX)


def in_turn(shares: list[Any]) -> list[Any]:
    """What the processes made of every n-th item each, in the items' order, in every process."""
    if not dist.is_initialized():
        return shares
    gathered: list[Any] = [None] * processes()
    dist.all_gather_object(gathered, shares)
    return [part[turn] for turn in range(len(gathered[0])) for part in gathered if turn < len(part)]


@contextmanager
def together(model: nn.Module) -> Iterator[nn.Module]:
    """The network as all processes train it; its parameters are the model's own.

    Args:
        model: Changed inside, and back again at the end.
    """
    if not dist.is_initialized():
        yield model
        return
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        vars(norm)["forward"] = MethodType(_forward, norm)
    device = best_device()
    devices = [device.index] if device.type == "cuda" else None
    try:
        # The statistics are the same in every process: nothing has to be sent around for them.
        yield DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _reduced(value: Tensor, operation: Any) -> Tensor:
    if not dist.is_initialized():
        return value.detach()
    reduced = value.detach().clone()
    dist.all_reduce(reduced, operation)
    return reduced


class _Sum(torch.autograd.Function):
    """Sum over the processes, whose gradient is the sum over the processes as well."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return _reduced(value, dist.ReduceOp.SUM)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _reduced(gradient, dist.ReduceOp.SUM)


def _forward(norm: nn.BatchNorm2d, given: Tensor) -> Tensor:
    """What a BatchNorm2d gives, or a subclass of timm with an activation behind it."""
    normalised = _normalised(norm, given)
    for name in ("drop", "act"):
        normalised = getattr(norm, name, nn.Identity())(normalised)
    return normalised


def _normalised(norm: nn.BatchNorm2d, given: Tensor) -> Tensor:
    """BatchNorm with mean and variance over the shares of all processes.

    torch's SyncBatchNorm does this on GPUs alone.
    """
    if not norm.training:
        return F.batch_norm(
            given, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    values = given.float()
    variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    count = torch.full_like(mean, values.numel() / values.shape[1], dtype=torch.float64)
    mean, variance = mean.double(), variance.double()
    sums = torch.stack([count, count * mean, count * (variance + mean**2)])
    count, total, squares = _Sum.apply(sums)
    mean = total / count
    variance = squares / count - mean**2
    _remember(norm, mean.detach(), (variance * count / (count - 1)).detach())
    scale = norm.weight * (variance + norm.eps).rsqrt().float()
    shift = norm.bias - mean.float() * scale
    normalised: Tensor = values * scale[:, None, None] + shift[:, None, None]
    return normalised.to(given.dtype)


def _remember(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of a batch."""
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    for running, now in ((norm.running_mean, mean), (norm.running_var, variance)):
        assert running is not None
        running.lerp_(now.to(running.dtype), norm.momentum)
