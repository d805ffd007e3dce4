"""Torch-Pruning adds the same penalty, so that its cut may start from the same sparse network."""

import copy

import torch
import torch_pruning

from crnn.settings import TrainSettings
from crnn.training import start
from pruning.gammas import norms_of
from pruning.sparsity import Subgradient
from tests.conftest import random_recogniser


def test_torch_prunings_regularizer_is_subgradient_to_the_bit() -> None:
    ours = random_recogniser().float()
    for parameter in ours.parameters():
        parameter.grad = torch.randn_like(parameter)
    theirs = copy.deepcopy(ours)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        other.grad = mine.grad.clone()
    pruner = torch_pruning.pruner.BNScalePruner(
        theirs,
        torch.zeros(1, 3, 32, 128),
        importance=torch_pruning.importance.BNScaleImportance(),
        reg=1e-3,
        ignored_layers=[theirs.rnn, theirs.head],
    )
    pruner.regularize(theirs)
    Subgradient(1e-3).before_step(start(ours, TrainSettings(epochs=1), seed=0), 0.1, 0.5)
    for name, layer in norms_of(ours).items():
        assert torch.equal(layer.weight.grad, theirs.get_submodule(name).weight.grad), name
