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
        chosen = closing.enter_context(_connected(settings, closing))
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
    from distributed import Client
    from prefect_dask import DaskTaskRunner

    closing.enter_context(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
    chosen: TaskRunner[Any] = DaskTaskRunner(address=address)
    return chosen


def _to_ray(address: str, closing: ExitStack) -> TaskRunner[Any]:
    import ray
    from prefect_ray import RayTaskRunner

    ray.init(address, namespace="crnn-slim", log_to_driver=False, logging_level="error")
    closing.callback(ray.shutdown)
    chosen: TaskRunner[Any] = RayTaskRunner(address=address)
    return chosen
