"""The networks of the article, and what a teacher gives: the same data and budget for each.

    .venv/bin/python -m benchmarks.backbones params/plates.yaml 0,1,2

Takes a params file, the seeds, and section.key=value for what shall differ from the file. Each
network is a frontier of cached stages, uncut and cut at 0.5 and 0.87, so that a comparison that was
interrupted goes on where it was: the student, with and without its teacher, with every seed, the
others with the first. At the end it compares them in one table and plot.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.slimming import frontier
from flows import project
from flows.experiment import load_experiment

RATIOS = [0.5, 0.87]
TEACHER = "resnet34"
STUDENT = "mobilenetv3_small_100"
BACKBONES = ("vgg13", STUDENT, "mobilenetv3_large_100", "ghostnet_100", "repvgg_a0", TEACHER)


def main() -> None:
    """Compute every frontier, then compare them."""
    params, given_seeds, *given = sys.argv[1:]
    seeds = [int(seed) for seed in given_seeds.split(",")]
    more = [f"ratios={RATIOS}", "quantize=null", *given]
    experiment = load_experiment(Path(params), more)
    names, rows = [], {}
    for backbone in BACKBONES:
        model = {"backbone": backbone, "hidden": experiment.model.hidden}
        if backbone == experiment.model.backbone:
            model["width"] = experiment.model.width
        names.append(f"{experiment.name}-{backbone}")
        own_seeds = seeds if backbone == STUDENT else seeds[:1]
        settings = [f"name={names[-1]}", f"model={model}"]
        rows[backbone] = frontier(params, own_seeds, settings, more)
    teacher = str(project.home() / rows[TEACHER][0]["checkpoint"])
    taught = [
        f"teacher={json.dumps({'checkpoint': teacher, 'epochs': 0})}",
        f"model={{backbone: {STUDENT}, hidden: {experiment.model.hidden}}}",
        "baseline.distill=1",
        "finetune.distill=1",
    ]
    names.append(f"{experiment.name}-{STUDENT}-taught")
    frontier(params, seeds, [f"name={names[-1]}", *taught], more)
    subprocess.run([sys.executable, "-m", "flows.cli", "compare", *names], check=True)


if __name__ == "__main__":
    main()
