"""Saved views of MLflow's page of an experiment: which runs, columns and charts are seen first.

MLflow keeps a view in a tag of the experiment, in the format of its own "Save view" (3.16 and
newer, which list the views in a menu).
"""

import base64
import json
import time
import zlib
from collections.abc import Sequence
from typing import Any

TAG = "mlflow.sharedViewState."
FRONTIER, TRAINING = "frontier", "training"
"""Names of the views, in addresses."""

Chart = dict[str, Any]

COSTS = ("cost/bytes", "cost/params_total", "cost/macs", "cost/onnx_latency_ms", "cost/latency_ms")
ACCURACIES = ("val/word_accuracy", "val/word_accuracy_unseen", "val/ned")
CURVES = ("val/word_accuracy", "train/loss", "gamma/share_zero", "gamma/q50")
SHARED = {"deleted": False, "isGenerated": False, "runsCountToCompare": 100}


def view_tags() -> dict[str, str]:
    """The views, each as the tag of an experiment in which MLflow keeps it."""
    now = int(1000 * time.time())
    tags = {}
    for name, (title, state) in _views().items():
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        view = {"name": title, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
        tags[f"{TAG}{name}"] = json.dumps(view)
    return tags


def page_of_view(experiment_id: str, name: str) -> str:
    """Where MLflow shows the charts of a view, from the root of its pages."""
    query = f"viewStateShareKey={name}&compareRunsMode=CHART"
    return f"#/experiments/{experiment_id}/runs?{query}"


def _views() -> dict[str, tuple[str, dict[str, Any]]]:
    """Title and state of each view, by its name."""
    accuracy = ACCURACIES[0]
    points = [_scatter(cost, accuracy) for cost in COSTS[:4]]
    everything = [_parallel(["prune/ratio_achieved", *COSTS[:4], accuracy])]
    curves = [_line(metric) for metric in CURVES]
    gammas = [{**SHARED, "type": "IMAGE", "imageKeys": ["gammas"], "step": 1}]
    trained = "tags.kind = 'stage' and metrics.`train/loss` >= 0"
    return {
        FRONTIER: (
            "Frontier: the points of all sweeps",
            _state(
                ("tags.kind = 'point'", accuracy, [*ACCURACIES, *COSTS]),
                {
                    "Accuracy against each cost": (2, 420, points),
                    "All together": (1, 420, everything),
                },
            ),
        ),
        TRAINING: (
            "Training: curves and gammas of the stages",
            _state(
                (trained, "train/loss", [*CURVES, "train/lines_per_second"]),
                {"Curves": (2, 420, curves), "Gammas, epoch by epoch": (1, 900, gammas)},
            ),
        ),
    }


def _scatter(x: str, y: str) -> Chart:
    axes = {"xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": y, "type": "METRIC"}}
    return {**SHARED, "type": "SCATTER", **axes}


def _parallel(metrics: Sequence[str]) -> Chart:
    shown = {"selectedParams": [], "selectedMetrics": list(metrics), "showAllRuns": True}
    return {**SHARED, "type": "PARALLEL", **shown}


def _line(metric: str) -> Chart:
    return {
        **SHARED,
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
    }


def _state(
    runs: tuple[str, str, Sequence[str]], sections: dict[str, tuple[int, int, list[Chart]]]
) -> dict[str, Any]:
    """What MLflow's page is made to show.

    Args:
        runs: Condition of the runs, the metric that sorts them, and the metrics in columns.
        sections: By title, how many charts stand side by side, their height in px, and the charts.
    """
    search, order_by, metrics = runs
    columns = [f"metrics.`{metric}`" for metric in metrics]
    shown = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {
        "searchFilter": search,
        "orderByKey": f"metrics.`{order_by}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "compareRunSections": [
            {**shown, "uuid": title, "name": title, "columns": abreast, "cardHeight": height}
            for title, (abreast, height, _) in sections.items()
        ],
        "compareRunCharts": [
            {**chart, "uuid": f"{title} {number}", "metricSectionId": title}
            for title, (*_, charts) in sections.items()
            for number, chart in enumerate(charts)
        ],
    }
