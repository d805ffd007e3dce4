"""The networks of the article, and what a teacher gives: the same data and budget for each.

    .venv/bin/python -m benchmarks.backbones params/plates-short.yaml 0,1,2
    .venv/bin/python -m benchmarks.backbones params/sroie-short.yaml 0 vgg13 ghostnet_100

Takes a params file, the seeds, the networks (all of the article's unless some are named), and
section.key=value for what shall differ from the file. Each network is a frontier of cached stages,
uncut and cut at 0.5 and 0.87, so that a comparison that was interrupted goes on where it was: the
student, with and without its teacher, with every seed, the others with the first. At the end it
prints a table in Markdown, and `crnn-slim compare` writes one page and plot of all. Processes with
a core of their own share the work, as in benchmarks.slimming.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.slimming import frontier, shuffled
from flows import project
from flows.experiment import Experiment, load_experiment
from flows.rows import ACCURACY, Row

RATIOS = [0.5, 0.87]
WHEN = ("before", "untuned")
COLUMNS = (
    "network",
    "cut",
    "params",
    "MACs",
    "torch / deployed, ms",
    "onnxruntime, ms",
    "before the cut",
    "after it",
    "word accuracy",
)
TEACHER = "resnet34"
STUDENT = "mobilenetv3_small_100"
TAUGHT = f"{STUDENT}, taught by {TEACHER}"
BACKBONES = ("vgg13", STUDENT, "mobilenetv3_large_100", "ghostnet_100", "repvgg_a0", TEACHER)


def main() -> None:
    """Compute every frontier, then compare them."""
    params, given_seeds, *given = sys.argv[1:]
    seeds = [int(seed) for seed in given_seeds.split(",")]
    named = [word for word in given if "=" not in word] or BACKBONES
    changed = [word for word in given if "=" in word]
    more = [f"ratios={RATIOS}", "quantize=null", *changed]
    experiment = load_experiment(Path(params), more)
    networks = {backbone: _settings(experiment, backbone) for backbone in named}

    def compute(network: str, seed: int) -> None:
        frontier(params, networks[network], more, [seed])

    shuffled(compute, [(b, seed) for b in networks for seed in _seeds(b, seeds)])
    if {TEACHER, STUDENT} <= networks.keys():
        checkpoint = frontier(params, networks[TEACHER], more, seeds[:1])[0]["checkpoint"]
        networks[TAUGHT] = _taught(experiment, project.home() / checkpoint)
        shuffled(compute, [(TAUGHT, seed) for seed in seeds])
    rows = {
        network: frontier(params, settings, more, _seeds(network, seeds))
        for network, settings in networks.items()
    }
    print("\n".join(table(rows)))
    names = [load_experiment(Path(params), settings).name for settings in networks.values()]
    if len(names) > 1:
        compare = [sys.executable, "-m", "flows.cli", "compare", *names]
        subprocess.run(compare, stdout=sys.stderr, check=True)


def _settings(experiment: Experiment, backbone: str) -> list[str]:
    model = {"backbone": backbone, "hidden": experiment.model.hidden}
    if backbone == experiment.model.backbone:
        model["width"] = experiment.model.width
    return [f"name={experiment.name}-{backbone}", f"model={model}"]


def _taught(experiment: Experiment, teacher: Path) -> list[str]:
    """The student's settings with a trained teacher."""
    return [
        *_settings(experiment, STUDENT),
        f"name={experiment.name}-{STUDENT}-taught",
        f"teacher={json.dumps({'checkpoint': str(teacher), 'epochs': 0})}",
        "baseline.distill=1",
        "finetune.distill=1",
    ]


def _seeds(network: str, seeds: list[int]) -> list[int]:
    """Those that a network is trained with: the student's and the taught one's are all."""
    return seeds if network in (STUDENT, TAUGHT) else seeds[:1]


def table(compared: dict[str, list[Row]]) -> list[str]:
    """Markdown, a line for each network and cut; means over the seeds, their spread behind."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| :-- |{' --: |' * (len(COLUMNS) - 1)}"]
    for network, rows in compared.items():
        lines += [f"| {' | '.join([network, *_cells(row)])} |" for row in rows]
    return lines


def _cells(row: Row) -> list[str]:
    """A point's figures, in the order of COLUMNS."""
    cut = "prune/word_accuracy_before" in row
    milliseconds = [row["cost/latency_ms"], row.get("cost/latency_deployed_ms")]
    spread = f" ± {100 * row[f'{ACCURACY}_std']:.1f}" if f"{ACCURACY}_std" in row else ""
    return [
        row["point"] if cut else "",
        f"{row['cost/params_total'] / 1e6:.2f} M",
        f"{row['cost/macs'] / 1e6:.0f} M",
        " / ".join(f"{ms:.2f}" for ms in milliseconds if ms is not None),
        f"{row['cost/onnx_latency_ms']:.2f}",
        *(f"{100 * row[f'prune/word_accuracy_{when}']:.1f}%" if cut else "" for when in WHEN),
        f"{100 * row[ACCURACY]:.1f}%{spread}",
    ]


if __name__ == "__main__":
    main()
