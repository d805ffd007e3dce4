"""How the ways to slim compare: the same data, baseline, budget and seeds for each.

    .venv/bin/python -m benchmarks.slimming params/quickstart.yaml 0,1,2
    .venv/bin/python -m benchmarks.slimming params/sroie.yaml 0 name=full model.width=1  # a day

Takes a params file, the seeds, and section.key=value for what shall differ from the file. Each way
is a frontier of cached stages with a setting or two changed, so that a comparison that was
interrupted goes on where it was; only the peer's trainings are the benchmark's own. What needs a
strength has several tried with the first seed and keeps the one with the best mean accuracy, chosen
on the val lines: that flatters it. One at the edge of those tried may not be the best there is.

Processes with a core of their own share the stages, nearly twice as fast as one on two cores: start
it as `taskset -c 0 ...` and, beside it, `taskset -c 1 ...`. Each does the peer's trainings, and
times networks beside the other's work.
"""

import json
import subprocess
import sys
from pathlib import Path
from random import sample
from statistics import mean, stdev
from typing import Any

from benchmarks.peer import figures
from flows import cache, project
from flows.experiment import load_experiment
from flows.running import SHORT_OF_RATIO

Rows = list[dict[str, Any]]
TUNED = "val/word_accuracy"
REQUESTED = "prune/ratio_requested"
FIGURES = {
    "before the cut": "prune/word_accuracy_before",
    "after the cut": "prune/word_accuracy_untuned",
    "fine-tuned": TUNED,
}

UNTAUGHT = ["sparse.distill=0", "finetune.distill=0"]
ARTICLE = [*UNTAUGHT, "prune.selection=reference", "prune.compensate=false"]
SUBGRADIENTS = (1e-4, 1e-3, 1e-2)
REFERENCE = "the reference rule"
WAYS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "auto": ([], ()),
    "auto, no teacher": (UNTAUGHT, ()),
    "proximal": (["sparse.method=proximal"], (0.1, 0.2, 0.4)),
    "polarization": (["sparse.method=polarization"], (0.05, 0.1, 0.2)),
    "subgradient": (["sparse.method=subgradient"], SUBGRADIENTS),
    REFERENCE: ([*ARTICLE, "sparse.method=subgradient"], SUBGRADIENTS),
}
"""Settings of each way, and the strengths to choose from."""


def main() -> None:
    """Compare, and print a table for each figure."""
    params, seeds, *given = sys.argv[1:]
    more = ["export=null", *given]
    numbers = [int(seed) for seed in seeds.split(",")]
    for settings, strengths in sample(list(WAYS.values()), len(WAYS)):
        chosen = [*settings, *_best_strength(params, numbers[0], settings, strengths, more)]
        compute(params, numbers, chosen, more)
    compared = {}
    for name, (settings, strengths) in WAYS.items():
        chosen = [*settings, *_best_strength(params, numbers[0], settings, strengths, more)]
        compared[f"{name} {' '.join(chosen[len(settings) :])}".strip()] = frontier(
            params, numbers, chosen, more
        )
        if name == REFERENCE:
            compared["Torch-Pruning"] = _peer(params, numbers, more, list(compared.values())[-1])
    for title, figure in FIGURES.items():
        print(f"\n{title}\n")
        print(*table(compared, figure), sep="\n")


def frontier(params: str, seeds: list[int], settings: list[str], more: list[str]) -> Rows:
    """The rows of a frontier, from its cached stages where there are any."""
    command = [sys.executable, "-m", "flows.cli", "frontier", params, "--json"]
    for override in [f"seeds={seeds}", *more, *settings]:
        command += ["--set", override]
    print("#", *command[2:], file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    rows: Rows = json.loads(done.stdout)["rows"]
    return rows


def compute(params: str, seeds: list[int], settings: list[str], more: list[str]) -> None:
    """Have the stages of a frontier cached; in random order, so that processes share the work."""
    for seed in sample(seeds, len(seeds)):
        frontier(params, [seed], settings, more)


def _best_strength(
    params: str, seed: int, settings: list[str], strengths: tuple[float, ...], more: list[str]
) -> list[str]:
    """The setting with which the cuts of one seed read best on average."""
    tried = {
        f"sparse.strength={strength}": frontier(
            params, [seed], [*settings, f"sparse.strength={strength}"], more
        )
        for strength in sample(strengths, len(strengths))
    }
    by_accuracy = {setting: mean(row[TUNED] for row in rows[1:]) for setting, rows in tried.items()}
    return [max(by_accuracy, key=lambda setting: by_accuracy[setting])] if tried else []


def _peer(params: str, seeds: list[int], more: list[str], reference: Rows) -> Rows:
    """What the peer makes of the sparse networks of the reference way, as rows like its."""
    experiment = load_experiment(Path(params), more)
    project.configure_environment()
    rows: Rows = [{"point": "baseline"}]
    for row in reference[1:]:
        of_seeds = []
        for seed in seeds:
            key = row["stages"].get("sparse") or row["stages"][f"sparse_seed_{seed}"]
            sparse = project.stages_folder() / key / cache.MODEL
            of_seeds.append(figures(experiment, sparse, row[REQUESTED], seed))
        spread = {f"{n}_std": stdev(f[n] for f in of_seeds) for n in of_seeds[0] if len(seeds) > 1}
        means = {n: mean(f[n] for f in of_seeds) for n in of_seeds[0]}
        rows.append({"point": row["point"], REQUESTED: row[REQUESTED], **means, **spread})
    return rows


def table(compared: dict[str, Rows], figure: str) -> list[str]:
    """Markdown: ways down, ratios across; mean over the seeds, standard deviation behind it."""
    points = [row["point"] for row in next(iter(compared.values()))[1:]]
    lines = [f"| | {' | '.join(points)} |", f"| :-- |{' --: |' * len(points)}"]
    for way, rows in compared.items():
        cells = " | ".join(_cell(row, figure) for row in rows[1:])
        lines.append(f"| {way} | {cells} |")
    return lines


def _cell(row: dict[str, Any], figure: str) -> str:
    spread = f" ± {100 * row[f'{figure}_std']:.1f}" if f"{figure}_std" in row else ""
    achieved = row["prune/ratio_achieved"]
    less = f" (cut {achieved:.2f})" if row[REQUESTED] - achieved > SHORT_OF_RATIO else ""
    return f"{100 * row[figure]:.1f}%{spread}{less}"


if __name__ == "__main__":
    main()
