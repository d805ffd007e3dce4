"""CTC heads: what the LSTM says of a frame to the logits of K classes, class 0 is the blank.

Of every head the last layer has a row for each class, and its bias is the head's last parameter.
"""

import math

import torch
from torch import Tensor, nn

BLANKS = 0.8
"""Probability of the CTC blank in every frame at the start."""


def two_layer_head(features: int, rank: int, classes: int) -> nn.Sequential:
    """A head of low rank: features to rank numbers, without a bias, and these to class logits."""
    return nn.Sequential(nn.Linear(features, rank, bias=False), nn.Linear(rank, classes))


class HeadWithRows(nn.Module):
    """A head of low rank, and some classes whose weights are a row of their own besides.

    Low rank plus sparse, as Yu et al. 2017 ("On compressing deep models by low rank and sparse
    decomposition"), but sparse by whole rows, which any runtime multiplies fast.

    Attributes:
        classes: Those that have a row, (R,), int64; all 0 until they are set.
        rows: Features to R logits, which are added to those of low_rank.
        low_rank: Features to K logits, as two_layer_head makes it.
    """

    classes: Tensor

    def __init__(self, features: int, rank: int, classes: int, rows: int) -> None:
        super().__init__()
        # On the meta device torch.arange would import sympy, for half a second.
        self.register_buffer("classes", torch.zeros(rows, dtype=torch.int64))
        self.rows = nn.Linear(features, rows, bias=False)
        self.low_rank = two_layer_head(features, rank, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Features (..., F) to logits (..., K)."""
        logits: Tensor = self.low_rank(frames)
        told = self.rows(frames)
        return logits.scatter_add(-1, self.classes.expand_as(told), told)


def expect_blanks(head: nn.Module) -> None:
    """Let a fresh head read a blank in nearly every frame, whatever it sees.

    Most frames are blank. A head that begins with all classes alike learns just that in its first
    steps, with the largest gradients of the whole training, and it takes epochs to undo what these
    do to the layers below. A prior as that of Lin et al. 2017 (arXiv:1708.02002, section 4.1).

    Args:
        head: Whose last parameter is its bias, (K,), which is set.
    """
    *_, bias = head.parameters()
    nn.init.zeros_(bias)
    nn.init.constant_(bias[:1], math.log(BLANKS / (1 - BLANKS) * (len(bias) - 1)))
