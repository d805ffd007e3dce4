"""Finding the prune ratio that meets a wish for size or speed, without training."""

from bisect import bisect_left
from dataclasses import replace
from functools import cache
from pathlib import Path

from flows.stages.sparse import highest_ratio, plan
from flows.stages.work import Outcome, Work
from pruning.cost import COSTS, out_of_reach
from pruning.settings import PruneSettings
from pruning.slimming import slim


def target(work: Work) -> Outcome:
    """Find the ratio of one target. A stage, so that a measured latency is measured once."""
    settings = PruneSettings.model_validate(work.settings["prune"])
    found = figures(work.input("sparse"), work.settings["kind"], work.settings["value"], settings)
    work.write_json("target.json", found)
    return "target.json", found


def figures(index: Path, kind: str, value: float, settings: PruneSettings) -> dict[str, float]:
    """What was asked for, what the cut that meets it costs, and its ratio; see ratio_for."""
    ratio, achieved = ratio_for(index, kind, value, settings)
    return {"target/requested": value, "target/achieved": achieved, "target/ratio": ratio}


def ratio_for(index: Path, kind: str, value: float, settings: PruneSettings) -> tuple[float, float]:
    """The lowest ratio whose cut costs at most a value, and what it costs.

    Args:
        index: Result file of a sparse stage.
        kind: Key of COSTS.
        value: Highest cost allowed.
        settings: Of the cut.

    Raises:
        SettingsError: No ratio that the floors allow is cheap enough, or the head's rank and rows
            save nothing.
    """

    @cache
    def cost(basis_points: int) -> float:
        uncut, masks = plan(index, basis_points / 10_000, settings)
        # As the fine-tuned network will be: the name of its stage is among its bytes.
        model = slim(uncut.model, masks, settings)
        return COSTS[kind](replace(uncut, model=model, stage="finetune"))

    highest = round(10_000 * highest_ratio(index, settings))
    if cost(highest) > value:
        raise out_of_reach(kind, value, cost(highest), highest / 10_000)
    # A higher ratio keeps a subset of the channels, and never costs more; its milliseconds may
    # differ by what the machine's vary by.
    found = bisect_left(range(highest), True, key=lambda point: cost(point) <= value)
    return found / 10_000, cost(found)
