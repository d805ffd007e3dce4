"""How far a sweep is and how long it still takes, learned from stages that have finished.

Of each kind of stage the mean time counts: of those of this sweep, else of the one under way by its
own steps, else of the sweep of this experiment before. Of what was never seen nothing is known, and
the forecast says so.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import mean
from typing import Any

from crnn.errors import UserError
from flows import project
from flows.cache import MANIFEST, Manifest, Stage
from flows.definitions import SHARING, TEACHER
from flows.experiment import Experiment
from flows.listing import folder_of, rows_of

LEAST = 0.02
"""Share of a stage that must be done here before its own steps say how long it takes."""


@dataclass
class UnderWay:
    """A stage that is being computed.

    Attributes:
        kind: Of the stage.
        begun: When its first step of this run was done, seconds.
        first: Share of the stage that was done then.
        share: Share that is done now.
        phase: Where it is, for a person.
    """

    kind: str
    begun: float
    first: float = 0.0
    share: float = 0.0
    phase: str = ""

    def expected(self) -> float | None:
        """Seconds of the whole stage by its own pace; None while that is not known."""
        done = self.share - self.first
        return (time.monotonic() - self.begun) / done if done >= LEAST else None


class Forecast:
    """Of one run of a sweep; told by its stages, whose threads run side by side.

    No dataclass: Prefect walks through those that tasks are given, while others change them.

    Attributes:
        planned: How many stages of each kind there are.
        abreast: How many of those that share the machine are computed at once.
        before: Seconds of such stages in the sweep before, by kind.
        finished: Seconds of the finished stages, by kind; a cached one has those of its making.
        under_way: By the label of the stage.
        added: Stages that were decided on the way, by kind.
    """

    def __init__(
        self, planned: Mapping[str, int], abreast: int, before: Mapping[str, Sequence[float]]
    ) -> None:
        self.planned, self.abreast, self.before = planned, abreast, before
        self.finished: dict[str, list[float]] = defaultdict(list)
        self.under_way: dict[str, UnderWay] = {}
        self.added: Counter[str] = Counter()

    def step(self, stage: Stage, event: Mapping[str, Any]) -> None:
        """Note a progress event of a stage."""
        if event["event"] == "step":
            share = event["step"] / event["steps"]
            seen = self.under_way.get(stage.label)
            if seen is None or share < seen.share:  # The data stage begins anew with each split.
                seen = UnderWay(_kind(stage.name, stage.label), time.monotonic(), share)
                self.under_way[stage.label] = seen
            seen.share, seen.phase = share, event["phase"]

    def finish(self, manifest: Manifest) -> None:
        """Note that a stage has finished."""
        self.under_way.pop(manifest.label, None)
        self.finished[_kind(manifest.stage, manifest.label)].append(manifest.seconds)

    def interrupt(self, stage: Stage) -> None:
        """Note that a stage has ended without a result."""
        self.under_way.pop(stage.label, None)

    def restart(self) -> None:
        """Forget what has finished: a sweep that is tried again finds it in the cache."""
        self.finished.clear()
        self.under_way.clear()
        self.added.clear()

    def add(self, stages: Mapping[str, int]) -> None:
        """Plan more stages, of some kinds, than the experiment alone could tell."""
        self.added.update(stages)

    def _counts(self) -> Counter[str]:
        return Counter(self.planned) + self.added

    @property
    def stages(self) -> tuple[int, int]:
        """How many stages have finished, and how many there are, of those that are planned."""
        counts = self._counts()
        done = sum(min(len(self.finished[kind]), count) for kind, count in counts.items())
        return done, counts.total()

    def left(self) -> tuple[float, list[str]]:
        """Seconds that are left as far as is known, and the kinds of which nothing is known."""
        seconds, unknown = 0.0, []
        for kind, count in self._counts().items():
            running = [stage for stage in list(self.under_way.values()) if stage.kind == kind]
            waiting = count - len(self.finished[kind])
            stages = waiting - sum(stage.share for stage in running)
            expected = self._expected(kind, running)
            if stages <= 0:
                continue
            if expected is None:
                unknown.append(kind)
            else:
                abreast = min(self.abreast, waiting) if kind in SHARING else 1
                seconds += stages * expected / abreast
        return seconds, unknown

    def _expected(self, kind: str, running: Sequence[UnderWay]) -> float | None:
        paces = [pace for stage in running if (pace := stage.expected())]
        known = self.finished[kind] or paces or self.before.get(kind)
        return mean(known) if known else None

    def sentence(self) -> str:
        """What is done and what is left, for a person."""
        done, of = self.stages
        seconds, unknown = self.left()
        least = "at least " if unknown else "about "
        time_left = f"{least}{duration(seconds)} left" if seconds else ""
        guess = f"no stage seen yet of: {', '.join(unknown)}" if unknown else ""
        return ", ".join(filter(None, [f"{done} of {of} stages", time_left, guess]))

    def report(self) -> str:
        """The sentence, and a line for each stage under way, Markdown."""
        lines = [self.sentence()]
        for label, stage in list(self.under_way.items()):
            expected = stage.expected()
            left = f", {duration((1 - stage.share) * expected)} left" if expected else ""
            lines.append(f"- {label}: {stage.phase}, {100 * stage.share:.0f}%{left}")
        return "\n".join(lines)


def forecast_of(experiment: Experiment, abreast: int) -> Forecast:
    """The forecast at the beginning of a sweep."""
    return Forecast(_planned(experiment), abreast, _sweep_before(experiment.name))


def _planned(experiment: Experiment) -> dict[str, int]:
    """Stages of each kind; not the training for 8 bits, which is decided on the way."""
    cuts = len(experiment.ratios) + len(experiment.prune.targets.wishes())
    controls = Counter(kind for r in experiment.ratios for kind in experiment.controls.kinds(r))
    networks = 1 + cuts + controls.total()
    rounded = networks if experiment.export and experiment.quantize else 0
    of_seed = {
        TEACHER: 1 if experiment.teacher else 0,
        "baseline": 1,
        "sparse": 1,
        "target": len(experiment.prune.targets.wishes()),
        "prune": cuts,
        "finetune": cuts,
        **controls,
        "export": networks if experiment.export else 0,
        "int8": rounded,
        "measure": networks + rounded,
        "latency": 1,
    }
    seeds = len(experiment.training_seeds)
    return {"data": 1, **{kind: seeds * count for kind, count in of_seed.items() if count}}


def _sweep_before(name: str) -> dict[str, list[float]]:
    """Seconds of the stages behind the newest sweep of an experiment, by kind."""
    found = defaultdict(list)
    # What is not there, or is damaged, teaches nothing; the cache looks after it.
    with suppress(UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        rows = rows_of(folder_of(name))
        for key in {key for row in rows for key in row["stages"].values()}:
            path = project.stages_folder() / key / MANIFEST
            if path.exists():
                manifest = json.loads(path.read_text(encoding="utf-8"))
                kind = _kind(manifest["stage"], manifest["label"])
                found[kind].append(float(manifest["seconds"]))
    return dict(found)


def _kind(name: str, label: str) -> str:
    """A teacher's stage is a baseline's, but takes a time of its own."""
    return TEACHER if label.startswith(TEACHER) else name


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
