"""Where the tasks of a flow run: in its own threads, or on the workers of a Dask or Ray cluster.

A worker has a state folder of its own and takes what its stages start from out of the store. That
the run was cancelled, or has ended, it learns from Prefect (flow_runs.watched).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from prefect.context import FlowRunContext
from prefect.task_runners import TaskRunner

from crnn.errors import SettingsError
from flows.experiment import LOCAL, ExecutionSettings

CONNECT_SECONDS = 15


@contextmanager
def runner(settings: ExecutionSettings) -> Iterator[None]:
    """Within a flow: have the tasks that are submitted inside run where the settings say.

    Raises:
        SettingsError: The library for it is missing, or the cluster cannot be reached.
    """
    run = FlowRunContext.get()
    if settings.runner == LOCAL or not run:
        yield
        return
    with ExitStack() as closing:
        chosen = _connected(settings, closing)
        closing.enter_context(run.model_copy(update={"task_runner": chosen}))
        yield


def _connected(settings: ExecutionSettings, closing: ExitStack) -> TaskRunner[Any]:
    connect = _to_dask if settings.runner == "dask" else _to_ray
    try:
        return connect(str(settings.cluster), closing)
    except ImportError as error:
        raise SettingsError(
            f"execution.runner: {settings.runner} needs libraries more: pip install"
            f" 'crnn-slim[{settings.runner}]'"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            "execution.cluster is the address of a running cluster, and none answers at"
            f" {settings.cluster} ({reason})"
        ) from error


def _to_dask(address: str, closing: ExitStack) -> TaskRunner[Any]:
    from prefect_dask import DaskTaskRunner

    options = {"timeout": CONNECT_SECONDS}
    chosen = closing.enter_context(DaskTaskRunner(address=address, client_kwargs=options))
    chosen.client  # noqa: B018  # It connects when it is first asked for.
    connected: TaskRunner[Any] = chosen
    return connected


def _to_ray(address: str, closing: ExitStack) -> TaskRunner[Any]:
    from prefect_ray import RayTaskRunner

    options = {"log_to_driver": False, "logging_level": "error"}
    connected: TaskRunner[Any] = closing.enter_context(
        RayTaskRunner(address=address, init_kwargs=options)
    )
    return connected
