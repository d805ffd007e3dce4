"""The pipeline: experiment files, cached stages, tracking, the frontier, the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.experiment import Experiment


def frontier(experiment: "Experiment", return_state: bool = False) -> Any:
    """Run the pipeline, with a Prefect server that is there or one for this run.

    Args:
        experiment: Its whole definition.
        return_state: Return Prefect's state, which is there for a cancelled run as well.

    Returns:
        The flows.pipeline.Frontier.

    Raises:
        UserError: A mistake in the data or the settings.
    """
    from flows import definitions, project
    from flows.server import start_server

    definitions.open_sources(experiment)  # A wrong place is told before Prefect takes its time.
    project.configure_environment()
    wait_for_server = start_server()
    from flows.pipeline import frontier as run

    wait_for_server()
    return run(experiment, return_state=True) if return_state else run(experiment)
