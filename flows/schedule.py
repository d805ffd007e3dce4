"""The frontier as a Prefect deployment that runs by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.schedules import Cron, Schedule
from prefect.types.entrypoint import EntrypointType

from crnn.errors import SettingsError
from flows.experiment import Experiment
from flows.pipeline import frontier

Overlap = Literal["skip", "queue", "allow"]

STRATEGIES = {
    "skip": ConcurrencyLimitStrategy.CANCEL_NEW,
    "queue": ConcurrencyLimitStrategy.ENQUEUE,
}
"""What becomes of a run whose time comes while the last one is still under way."""

RETRIES = 2
"""Of a scheduled run, where the experiment does not say how many."""


def serve(experiment: Experiment, times: Sequence[Schedule], overlap: Overlap) -> None:
    """Run an experiment whenever its time comes, until this process is stopped.

    Args:
        experiment: Its definition, the defaults of the form in Prefect's pages.
        times: When.
        overlap: Whether a run is skipped, waits or begins while the last one is under way.
    """
    limit = (
        ConcurrencyLimitConfig(limit=1, collision_strategy=STRATEGIES[overlap])
        if overlap in STRATEGIES
        else None
    )
    frontier.serve(
        name=experiment.name,
        schedules=list(times),
        parameters={"experiment": parameters_of(experiment)},
        global_limit=limit,
        entrypoint_type=EntrypointType.MODULE_PATH,
        print_starting_message=False,
    )


def schedules(crons: Sequence[str], timezone: str) -> list[Schedule]:
    """What Prefect makes of crons, in a timezone such as Europe/Berlin.

    Raises:
        SettingsError: A cron or timezone that Prefect does not understand.
    """
    for cron in crons:
        try:
            CronSchedule(cron=cron, timezone=timezone)
        except ValueError as error:
            raise SettingsError(
                f"--cron {cron!r} with --timezone {timezone!r} is no schedule; five fields are"
                " needed, such as '0 2 * * *', and a timezone such as Europe/Berlin"
            ) from error
    return [Cron(cron, timezone=timezone) for cron in crons]


def parameters_of(experiment: Experiment) -> dict[str, Any]:
    """An experiment as the form in Prefect's pages has it; its paths hold from any folder."""
    tree = experiment.model_dump(mode="json")
    tree["data"]["root"] = str(Path(experiment.data.root).resolve())
    for section in ("baseline", "teacher"):
        if tree[section] and tree[section]["checkpoint"]:
            tree[section]["checkpoint"] = str(Path(tree[section]["checkpoint"]).resolve())
    if "retries" not in experiment.execution.model_fields_set:
        tree["execution"]["retries"] = RETRIES
    return tree
