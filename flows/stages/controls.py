"""The controls: networks that were not slimmed, trained with the multiply-adds of one that was.

Whether slimming is worth its trouble is asked of the same architecture from fresh weights (Liu et
al. 2019, "Rethinking the Value of Network Pruning", arXiv:1810.05270, Scratch-B, which evens out
computation as well) and of an uncut network that is as small.
"""

import copy
from bisect import bisect_right

import torch

from crnn.checkpoint import load_checkpoint
from crnn.networks.heads import expect_blanks
from crnn.networks.recogniser import Recogniser, initialise
from crnn.settings import TrainSettings
from flows.cache import MODEL
from flows.stages.training import train
from flows.stages.work import Outcome, Work
from pruning.cost import macs, parameters

WIDTH_STEPS = 10_000
"""Widths are searched to four decimals, finer than any layer changes its channels."""


def scratch(work: Work) -> Outcome:
    """Train the architecture of a cut from fresh weights."""
    pruned = load_checkpoint(work.input("prune")).model
    return MODEL, _train_control(work, pruned, fresh(pruned, work.settings["seed"]))


def small(work: Work) -> Outcome:
    """Train an uncut network with about as many parameters as a cut one, all layers narrower."""
    pruned = load_checkpoint(work.input("prune")).model
    model = fresh(as_small(pruned), work.settings["seed"])
    return MODEL, {**_train_control(work, pruned, model), "control/width": model.settings.width}


def _train_control(work: Work, pruned: Recogniser, model: Recogniser) -> dict[str, float]:
    built, spent = Recogniser(pruned.settings, pruned.classes), work.settings
    uncut = load_checkpoint(work.input("baseline")).model if _has(work, "baseline") else built
    teacher = load_checkpoint(work.input("teacher")).model if _has(work, "teacher") else uncut
    total = spent["uncut_epochs"] * macs(uncut) + spent["cut_epochs"] * macs(pruned)
    total += spent.get("fresh_epochs", 0) * macs(built)
    # A teacher only reads: one pass more, where training is three (forward and twice backward).
    total += (spent.get("teacher_epochs", 0) + spent["taught_epochs"] / 3) * macs(teacher)
    epochs = epochs_for(total, macs(model))
    work.write_summary(model)
    settings = TrainSettings.model_validate({**work.settings["train"], "epochs": epochs})
    return {**train(work, model, settings)[1], "control/epochs": float(epochs)}


def _has(work: Work, name: str) -> bool:
    return name in work.job["inputs"]


def epochs_for(total: float, macs_of_control: int) -> int:
    """Epochs in which a control spends what the slimming path spent, at least one.

    Forward multiply-adds of one line stand for the cost of training on it: the backward pass
    takes the same multiple of them in each network. The penalty's own work is not counted, nor
    what is the same for every network, such as reading and augmenting lines.

    Args:
        total: Multiply-adds of the slimming path: those of one line, summed over its epochs.
        macs_of_control: Multiply-adds of one line.
    """
    return max(1, round(total / macs_of_control))


def as_small(pruned: Recogniser) -> Recogniser:
    """An uncut network as small: LSTM and head like the cut one's, and the width that is left.

    With the uncut LSTM or head, little or nothing would be left for the channels of such a rival.
    """
    width = width_for(parameters(pruned)["total"], pruned)
    return uncut_like(pruned, width)


def width_for(count: int, pruned: Recogniser) -> float:
    """The largest width factor, up to the cut network's own, with at most so many parameters.

    Where one channel a layer is too many already, the smallest width.

    Args:
        count: Parameters.
        pruned: Whose LSTM and head the network is to have.
    """

    def size(step: int) -> int:
        with torch.device("meta"):  # It is counted, not run.
            return parameters(uncut_like(pruned, step / WIDTH_STEPS))["total"]

    steps = range(1, round(pruned.settings.width * WIDTH_STEPS) + 1)
    # A wider network never has fewer parameters.
    return max(1, bisect_right(steps, count, key=size)) / WIDTH_STEPS


def uncut_like(pruned: Recogniser, width: float) -> Recogniser:
    """A network with all channels of that width factor, and LSTM and head like the cut one's."""
    changed = {"width": width, "hidden": pruned.rnn.hidden_size}
    model = Recogniser(pruned.settings.model_copy(update=changed), pruned.classes)
    model.head = copy.deepcopy(pruned.head)
    return model


def fresh(model: Recogniser, seed: int) -> Recogniser:
    """A network of the same layers with new weights; VGG13 gets those that one of that seed has.

    Networks of timm have rules of their own for some biases, which begin as torch's do here.
    """
    torch.manual_seed(seed)
    new = copy.deepcopy(model)
    for layer in new.modules():
        reset = getattr(layer, "reset_parameters", None)
        if reset:
            reset()
    new.apply(initialise)
    expect_blanks(new.head)
    return new
