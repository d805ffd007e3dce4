"""What cuts of the LSTM and of the head cost before any fine-tuning, compensated and not.

    .venv/bin/python -m benchmarks.lstm_and_head params/sroie.yaml 0.62    # minutes

Takes a params file whose sparse stage is in the cache, the ratio at which the channels are cut, and
section.key=value for what shall differ from the file. The first line is the cut of channels alone.
A head that would not become smaller has no figures.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.cuts import lines_of
from crnn.data.batches import Lines
from crnn.devices import best_device
from crnn.errors import SettingsError
from crnn.evaluation import evaluate
from flows.experiment import load_experiment
from flows.preview import find_sparse
from flows.rows import ACCURACY
from flows.stages.sparse import plan
from pruning.cost import parameters
from pruning.settings import PruneSettings
from pruning.slimming import slim
from pruning.surgery import revive

CUTS: list[Mapping[str, float]] = [
    {},
    *({"lstm_ratio": ratio} for ratio in (0.2, 0.4, 0.6, 0.8)),
    *({"head_rank": rank} for rank in (32, 16, 8, 4, 2)),
    *({"head_rank": 2, "head_rows": rows} for rows in (16, 32, 65)),
    {"lstm_ratio": 0.6, "head_rank": 2, "head_rows": 65},
]
COLUMNS = ("cut", "LSTM", "head", "compensated", "weights alone")


def main() -> None:
    """Cut at every setting, and print what the network then reads."""
    params, ratio, *changed = sys.argv[1:]
    experiment = load_experiment(Path(params), changed)
    sparse = find_sparse(experiment)
    index = sparse.file(sparse.result)
    train, val = lines_of(experiment)
    print(f"| {' | '.join(COLUMNS)} |", f"| :-- |{' --: |' * (len(COLUMNS) - 1)}", sep="\n")
    for cut in CUTS:
        settings = PruneSettings.model_validate({**experiment.prune.model_dump(), **cut})
        try:
            cells = _cells(index, float(ratio), settings, train, val)
        except SettingsError as error:
            print(error, file=sys.stderr)
            cells = ["-"] * (len(COLUMNS) - 1)
        name = ", ".join(f"{name} {value:g}" for name, value in cut.items())
        print(f"| {' | '.join([name, *cells])} |", flush=True)


def _cells(
    index: Path, ratio: float, settings: PruneSettings, train: Lines, val: Lines
) -> list[str]:
    """Parameters of LSTM and head after a cut, and word accuracy in both ways."""
    checkpoint, masks = plan(index, ratio, settings)
    revive(checkpoint.model, masks)
    read = []
    for lines in (train, None):
        model = slim(checkpoint.model, masks, settings, lines)
        read.append(f"{100 * evaluate(model.to(best_device()), val, set())[ACCURACY]:.1f}%")
    sizes = parameters(model)
    return [*(f"{sizes[part] / 1e6:.3f} M" for part in ("lstm", "head")), *read]


if __name__ == "__main__":
    main()
