"""Cuts that the pipeline does not make, of cached sparse networks; for benchmarks/slimming.py."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

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
from flows.cache import MODEL
from flows.definitions import VERSIONS, fingerprint, given_charset
from flows.experiment import Experiment
from flows.rows import ACCURACY
from flows.stages.sparse import INDEX, plan
from flows.stages.work import seed_of
from pruning.gammas import widths
from pruning.settings import PruneSettings
from pruning.slimming import slim
from pruning.surgery import revive

VERSION = 2
"""Raised when what is here gives other figures."""

Cut = Callable[[Path, float, PruneSettings], Recogniser]
"""Makes the cut network of a sparse stage's folder, a ratio and what else was set."""


def by_torch_pruning(sparse: Path, ratio: float, _: PruneSettings) -> Recogniser:
    """Remove channels as Torch-Pruning's BNScalePruner does (Fang et al. 2023).

    They rank over all layers by |gamma| over its layer's mean, and their constants are dropped. Its
    regularizer adds s x sign(gamma) to the gradient, which is this project's `subgradient`
    (tests/pruning/test_cuts.py holds them to the same bits), so that the sparse network is one that
    it could have made. It leaves a layer whole where all of its channels would go, and may so cut
    less than it is asked to.
    """
    model = load_checkpoint(sparse / MODEL).model
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


def of_the_last(sparse: Path, ratio: float, settings: PruneSettings) -> Recogniser:
    """Cut the last network of an `auto` stage at any ratio, and let the dead that stay learn.

    What the snapshots of the stage are worth is seen from this: it does without them.
    """
    index = json.loads((sparse / INDEX).read_text(encoding="utf-8"))
    last = index["networks"][-1]
    index["networks"] = [{**last, "file": str(sparse / last["file"])}]
    with TemporaryDirectory() as folder:
        (Path(folder) / INDEX).write_text(json.dumps(index), encoding="utf-8")
        checkpoint, masks = plan(Path(folder) / INDEX, ratio, settings)
    revive(checkpoint.model, masks)
    return slim(checkpoint.model, masks, settings)


def figures(
    experiment: Experiment, sparse: Path, ratio: float, seed: int, cut: Cut
) -> dict[str, float]:
    """Accuracy of a sparse network before its cut, after it, and fine-tuned; kept for next time.

    Args:
        experiment: Data, cut and fine-tuning, which is done without a teacher and recalibration.
        sparse: Folder of the stage.
        ratio: Share of the channels to remove.
        seed: Of the fine-tuning.
        cut: One of those above.
    """
    content = [cut.__name__, sha256(sparse / MODEL), ratio, seed, fingerprint(experiment)]
    settings = (experiment.prune, experiment.finetune)
    versions = [VERSION, VERSIONS["prune"], VERSIONS["finetune"], version("torch_pruning")]
    identity = json.dumps([*content, *versions, *(s.model_dump(mode="json") for s in settings)])
    name = f"cut-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.json"
    memo = project.home() / "benchmarks" / name
    if not memo.exists():
        write_atomic(memo, json.dumps(_figures(experiment, sparse, ratio, seed, cut)).encode())
    found: dict[str, float] = json.loads(memo.read_text(encoding="utf-8"))
    return found


def _figures(
    experiment: Experiment, sparse: Path, ratio: float, seed: int, cut: Cut
) -> dict[str, float]:
    train, val = lines_of(experiment)
    uncut = load_checkpoint(sparse / MODEL).model.to(best_device())
    model = cut(sparse, ratio, experiment.prune).to(best_device())
    untuned = evaluate(model, val, set())[ACCURACY]
    begun = start(model, experiment.finetune, seed_of("finetune", seed))
    fit(begun, train, experiment.finetune)
    return {
        "prune/ratio_achieved": 1 - sum(widths(model).values()) / sum(widths(uncut).values()),
        "prune/word_accuracy_before": evaluate(uncut, val, set())[ACCURACY],
        "prune/word_accuracy_untuned": untuned,
        ACCURACY: evaluate(model, val, set())[ACCURACY],
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
