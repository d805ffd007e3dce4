"""What a layer says over the frames of many lines: its mean, and how its numbers vary together."""

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-9
"""Variance and scale that are always there, so that they can be divided by."""

RIDGE = 1e-4
"""Of the mean variance, added to all: few frames must not make large weights out of chance."""


@dataclass(frozen=True)
class Moments:
    """Of F numbers a frame, float64.

    Attributes:
        mean: (F,).
        covariance: (F, F).
    """

    mean: Tensor
    covariance: Tensor

    def of(self, numbers: slice) -> "Moments":
        """Those of some of the numbers alone."""
        return Moments(self.mean[numbers], self.covariance[numbers, numbers])

    def predict(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """The affine function of the known numbers that is nearest to the others (least squares).

        Args:
            known: Boolean (F,), k of them True.

        Returns:
            Weight (F - k, k) and bias (F - k,).
        """
        within = self.covariance[known][:, known]
        ridge = (RIDGE * within.diagonal().mean() + TINY) * torch.eye(len(within)).double()
        weight = torch.linalg.solve(within + ridge, self.covariance[known][:, ~known]).T
        return weight, self.mean[~known] - weight @ self.mean[known]


class Sums:
    """Frames added up, batch by batch, to their moments."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        self._frames = 0
        self._sum = torch.zeros(numbers, dtype=torch.double, device=device)
        self._products = self._sum.new_zeros(numbers, numbers)

    def add(self, outputs: Tensor) -> None:
        """Count the frames of a batch, (T, N, F)."""
        frames = outputs.flatten(0, 1).double()
        self._frames += len(frames)
        self._sum += frames.sum(0)
        self._products += frames.T @ frames

    def moments(self) -> Moments:
        """Of all frames so far, on the CPU."""
        mean = (self._sum / self._frames).cpu()
        return Moments(mean, (self._products / self._frames).cpu() - mean.outer(mean))
