"""How the ways to slim compare: the same data, baseline, budget and seeds for each.

    .venv/bin/python -m benchmarks.slimming params/quickstart.yaml 0,1,2

Takes a params file, the seeds, and section.key=value for what shall differ from the file. Each way
is a frontier of cached stages with a setting or two changed, so that a comparison that was
interrupted goes on where it was; only what benchmarks/cuts.py cuts is trained by the benchmark.
What needs a strength has several tried with the first seed and keeps the one with the best mean
accuracy, chosen on the val lines: that flatters it. As long as that is the weakest or the strongest
of them, one more is tried beyond it. All ways but the published rules, which have no floor, leave
of each layer what `auto` leaves. With `controls={scratch: true, small: true}` each way whose cut is
the pipeline's own has its controls.

Processes with a core of their own share the stages, nearly twice as fast as one on two cores: start
it as `taskset -c 0 ...` and, beside it, `taskset -c 1 ...`. Each does the benchmark's own
trainings, and times networks beside the other's work.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from random import sample
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.cuts import Cut, by_torch_pruning, figures, of_the_last
from flows import project
from flows.experiment import load_experiment
from flows.rows import CONTROLS
from flows.running import SHORT_OF_RATIO
from pruning.sparsity import FLOOR

Rows = list[dict[str, Any]]
OfSeeds = Callable[[list[int]], Rows]
TUNED = "val/word_accuracy"
REQUESTED = "prune/ratio_requested"
FIGURES = {
    "before the cut": "prune/word_accuracy_before",
    "after the cut": "prune/word_accuracy_untuned",
    "fine-tuned": TUNED,
}

UNTAUGHT = ["sparse.distill=0", "finetune.distill=0", "baseline.distill=null", "teacher=null"]
FLOOR_OF_AUTO = f"prune.min_ratio={FLOOR}"
ARTICLE = [*UNTAUGHT, "prune.selection=reference", "prune.compensate=false"]
SUBGRADIENT = "sparse.method=subgradient"
SUBGRADIENTS = (1e-2, 3e-2, 1e-1)


class Way(NamedTuple):
    """A way to slim.

    Attributes:
        settings: In which it differs from the params file.
        strengths: To begin with, ascending; none: it needs none.
        cut: Where the cut is not the pipeline's own.
    """

    settings: Sequence[str] = ()
    strengths: tuple[float, ...] = ()
    cut: Cut | None = None


WAYS = {
    "auto": Way(),
    "auto, no teacher": Way(UNTAUGHT),
    "auto, fine-tuning taught as well": Way(["finetune.distill=1"]),
    "auto, statistics estimated anew": Way(["finetune.recalibrate=2000"]),
    "auto, every cut of the last network": Way(cut=of_the_last),
    "proximal": Way(["sparse.method=proximal", FLOOR_OF_AUTO], (0.4, 0.8, 1.6)),
    "polarization": Way(["sparse.method=polarization", FLOOR_OF_AUTO], (0.1, 0.4, 1.6)),
    "subgradient": Way([SUBGRADIENT, FLOOR_OF_AUTO], SUBGRADIENTS),
    "the reference rule": Way([*ARTICLE, SUBGRADIENT], SUBGRADIENTS),
    "Torch-Pruning's BNScalePruner": Way([*ARTICLE, SUBGRADIENT], SUBGRADIENTS, by_torch_pruning),
}

STRENGTHS = 6
"""The most that are tried of one way."""


def main() -> None:
    """Compare, and print a table for each figure."""
    params, given_seeds, *given = sys.argv[1:]
    seeds = [int(seed) for seed in given_seeds.split(",")]
    way = partial(_way, params, ["export=null", *given])

    tried: dict[str, dict[float, Rows]] = {name: {} for name in WAYS}

    @cache
    def accuracy(name: str, strength: float | None) -> float:
        rows = way(name, strength, "controls={}")(seeds[:1])
        if strength is not None:
            tried[name][strength] = rows
        return mean(float(row[TUNED]) for row in rows[1:])

    def best_of(name: str) -> float | None:
        strengths = WAYS[name].strengths
        return best_inside(strengths, partial(accuracy, name)) if strengths else None

    shuffled(
        accuracy, [(n, s) for n, (_, strengths, _) in WAYS.items() for s in strengths or [None]]
    )
    shuffled(best_of, [(name,) for name in WAYS])
    best = {name: best_of(name) for name in WAYS}
    chosen = {name: way(name, strength) for name, strength in best.items()}
    shuffled(lambda name, seed: chosen[name]([seed]), product(WAYS, seeds))
    compared: dict[str, Rows] = {}
    for name, of_seeds in chosen.items():
        title = name if best[name] is None else f"{name} {best[name]:.3g}"
        compared |= _with_controls(title, of_seeds(seeds))
    for title, figure in FIGURES.items():
        print(f"\n{title}\n")
        print(*table(compared, figure), sep="\n")
    print(f"\nfine-tuned, by strength, seed {seeds[0]}\n")
    by_strength = {
        f"{name} {strength:.3g}": tried[name][strength]
        for name in WAYS
        for strength in sorted(tried[name])
    }
    print(*table(by_strength, TUNED), sep="\n")


def frontier(params: str, settings: list[str], more: list[str], seeds: list[int]) -> Rows:
    """The rows of a frontier, from its cached stages where there are any."""
    command = [sys.executable, "-m", "flows.cli", "frontier", params, "--json"]
    for override in [f"seeds={seeds}", *more, *settings]:
        command += ["--set", override]
    print("#", *command[2:], file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    rows: Rows = json.loads(done.stdout)["rows"]
    return rows


def shuffled(work: Callable[..., object], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Do work with each of arguments, in random order: processes that do the same share it."""
    every = list(arguments)
    for each in sample(every, len(every)):
        work(*each)


def _way(params: str, more: list[str], name: str, strength: float | None, *changes: str) -> OfSeeds:
    """What gives the rows of a way with a strength, None where it needs none."""
    settings, _, cut = WAYS[name]
    given = [] if strength is None else [f"sparse.strength={strength:.3g}"]
    of_seeds = partial(frontier, params, [*settings, *given, *changes], more)
    return partial(_cut_otherwise, params, more, cut, of_seeds) if cut else of_seeds


def best_inside(grid: tuple[float, ...], accuracy: Callable[[float], float]) -> float:
    """The best of ascending numbers, which go on where that is the first or the last.

    The next one is as many times its neighbour as the second is the first.
    """
    best = max(grid, key=accuracy)
    if grid[0] < best < grid[-1] or len(grid) >= STRENGTHS:
        return best
    step = grid[1] / grid[0]
    wider = (grid[0] / step, *grid) if best == grid[0] else (*grid, grid[-1] * step)
    return best_inside(wider, accuracy)


def _cut_otherwise(
    params: str, more: list[str], cut: Cut, of_seeds: OfSeeds, seeds: list[int]
) -> Rows:
    """What another cut makes of the sparse networks of a way, as rows like its."""
    experiment = load_experiment(Path(params), more)
    project.configure_environment()
    rows: Rows = [{"point": "baseline"}]
    for row in of_seeds(seeds)[1:]:
        if "control" in row:
            continue
        found = []
        for seed in seeds:
            key = row["stages"].get("sparse") or row["stages"][f"sparse_seed_{seed}"]
            folder = project.stages_folder() / key
            found.append(figures(experiment, folder, row[REQUESTED], seed, cut))
        spread = {f"{n}_std": stdev(f[n] for f in found) for n in found[0] if len(seeds) > 1}
        means = {n: mean(f[n] for f in found) for n in found[0]}
        rows.append({"point": row["point"], REQUESTED: row[REQUESTED], **means, **spread})
    return rows


def _with_controls(name: str, rows: Rows) -> dict[str, Rows]:
    """The rows of a way under its name, those of its controls under names of their own."""
    kinds = dict.fromkeys(row["control"] for row in rows if "control" in row)
    own = {name: [row for row in rows if "control" not in row]}
    controls = {
        f"{name}: {CONTROLS[kind]}": [rows[0], *(row for row in rows if row.get("control") == kind)]
        for kind in kinds
    }
    return own | controls


def table(compared: dict[str, Rows], figure: str) -> list[str]:
    """Markdown: ways down, ratios across; mean over the seeds, standard deviation behind it."""
    points = [row["point"] for row in next(iter(compared.values()))[1:]]
    lines = [f"| | {' | '.join(points)} |", f"| :-- |{' --: |' * len(points)}"]
    for way, rows in compared.items():
        cut = {row["point"].split()[-1]: row for row in rows[1:]}
        if any(figure in row for row in cut.values()):
            cells = " | ".join(_cell(cut.get(point, {}), figure) for point in points)
            lines.append(f"| {way} | {cells} |")
    return lines


def _cell(row: dict[str, Any], figure: str) -> str:
    if figure not in row:
        return ""
    spread = f" ± {100 * row[f'{figure}_std']:.1f}" if f"{figure}_std" in row else ""
    achieved = row.get("prune/ratio_achieved", row.get(REQUESTED, 0))
    less = f" (cut {achieved:.2f})" if row.get(REQUESTED, 0) - achieved > SHORT_OF_RATIO else ""
    return f"{100 * row[figure]:.1f}%{spread}{less}"


if __name__ == "__main__":
    main()
