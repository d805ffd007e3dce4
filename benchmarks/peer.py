"""The peer in benchmarks/slimming.py: Torch-Pruning's BNScalePruner (Fang et al. 2023).

Its regularizer adds s x sign(gamma) to the gradient, which is this project's `subgradient`
(tests/pruning/test_peer.py holds them to the same bits), so it takes that sparse network from the
cache. Its importance and its cut, which drops the constants, are its own; fine-tuning is this
project's without a teacher, which it does not have. It leaves a layer whole where all of its
channels would go, so that it may cut less than it is asked to: the table says where.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch_pruning

from crnn.checkpoint import load_checkpoint
from crnn.data.batches import Lines
from crnn.data.check import check_splits
from crnn.devices import best_device
from crnn.evaluation import evaluate
from crnn.files import sha256, write_atomic
from crnn.networks.recogniser import Recogniser
from crnn.networks.vgg import STRIDE
from crnn.training import fit, start
from flows import project
from flows.definitions import fingerprint, given_charset
from flows.experiment import Experiment
from flows.rows import ACCURACY
from pruning.gammas import widths


def cut_by_torch_pruning(model: Recogniser, ratio: float) -> Recogniser:
    """Remove a share of the channels, ranked over all layers by |gamma| over its layer's mean.

    Args:
        model: On the CPU; changed in place.
        ratio: Share of the channels to remove.
    """
    pruner = torch_pruning.pruner.BNScalePruner(
        model,
        torch.zeros(1, 3, 32, 128),
        importance=torch_pruning.importance.BNScaleImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[model.rnn, model.head],
    )
    pruner.step()
    return model


def figures(experiment: Experiment, sparse: Path, ratio: float, seed: int) -> dict[str, float]:
    """Accuracy of a sparse network before its cut, after it, and fine-tuned; kept for next time.

    Args:
        experiment: Data and fine-tuning.
        sparse: Checkpoint.
        ratio: Share of the channels to remove.
        seed: Of the fine-tuning.
    """
    content = [sha256(sparse), ratio, seed, fingerprint(experiment)]
    identity = json.dumps([*content, experiment.finetune.model_dump(mode="json")])
    name = f"peer-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.json"
    memo = project.home() / "benchmarks" / name
    if not memo.exists():
        write_atomic(memo, json.dumps(_figures(experiment, sparse, ratio, seed)).encode())
    found: dict[str, float] = json.loads(memo.read_text(encoding="utf-8"))
    return found


def _figures(experiment: Experiment, sparse: Path, ratio: float, seed: int) -> dict[str, float]:
    train, val = lines_of(experiment)
    model = load_checkpoint(sparse).model
    channels = sum(widths(model).values())
    before = evaluate(model, val, set())[ACCURACY]
    cut = cut_by_torch_pruning(model, ratio).to(best_device())
    untuned = evaluate(cut, val, set())[ACCURACY]
    run = start(cut, experiment.finetune, seed)
    fit(run, train, experiment.finetune)
    return {
        "prune/ratio_achieved": 1 - sum(widths(cut).values()) / channels,
        "prune/word_accuracy_before": before,
        "prune/word_accuracy_untuned": untuned,
        ACCURACY: evaluate(cut, val, set())[ACCURACY],
    }


def lines_of(experiment: Experiment) -> tuple[Lines, Lines]:
    """Train and val as the data stage leaves them."""
    data = experiment.data
    checked = check_splits(data, experiment.seed, given_charset(data), STRIDE)
    train, val = (
        Lines(part.source, part.indices, part.widths, checked.charset, data.max_width)
        for part in checked.splits.values()
    )
    return train, val
