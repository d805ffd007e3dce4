"""The page of a sweep that is sent to a colleague: one HTML file that needs no network."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crnn.data.images import fit_line
from crnn.data.sources import open_source
from flows import cache, project
from flows.cache import ERRORS, SUMMARY, WIDTHS
from flows.champion import best_of
from flows.experiment import Experiment
from flows.rows import ACCURACY, Row

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "__DATA__"

SHOWN_ERRORS = 12
"""Wrongly read lines that are shown of each point."""

BINS = 40
MAX_EPOCHS = 60
"""Epochs that the slider of the gammas has at most."""

CURVES = {"accuracy": (ACCURACY, 100), "loss": ("train/loss", 1)}


def page_of(shown: Mapping[str, Any], details: Mapping[str, Any]) -> bytes:
    """The page.

    Args:
        shown: title, subject, sentences, axes, size, table and rows, each row with its kind.
        details: Of details_of; empty where only rows are known.
    """
    nothing: dict[str, Any] = {
        "points": [],
        "channels": {},
        "gammas": {},
        "curves": {},
        "images": {},
        "details": {},
    }
    content = json.dumps({**nothing, **shown, **details}, ensure_ascii=False)
    safe = content.replace("<", "\\u003c")  # No label may end the script that it is in.
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, safe).encode()


def details_of(
    experiment: Experiment, rows: Sequence[Row], computed: Sequence[str]
) -> dict[str, Any]:
    """What the stages behind a sweep left on disk, as the page shows it.

    Args:
        experiment: Its definition.
        rows: Of the frontier.
        computed: Labels of the stages that this run computed.
    """
    baseline = {e["index"] for e in _errors(rows[0]) or []}
    points = [_point(row, baseline) for row in rows]
    chosen = sorted({e["index"] for point in points for e in point["errors"] or []})
    champion = best_of(rows, experiment.champion) if experiment.champion else None
    base = _folder(rows[0], "baseline")
    sparse = next((f for row in rows if (f := _folder(row, "sparse"))), None)
    return {
        "points": points,
        "lines": int(rows[0]["val/samples"]),
        "champion": champion["point"] if champion else None,
        "channels": _channels(sparse),
        "gammas": {
            name: found
            for name, folder in (("baseline", base), ("sparse", sparse))
            if (found := _gammas(folder))
        },
        "curves": _curves(rows, base, sparse),
        "images": _images(experiment, chosen),
        "details": _texts(experiment, rows, computed),
    }


def _folder(row: Row, stage: str) -> Path | None:
    """Where a stage behind a row left its files, of the first seed; None where it has none."""
    keys = row["stages"]
    key = keys.get(stage) or next(
        (k for n, k in keys.items() if n.startswith(f"{stage}_seed_")), None
    )
    folder = project.stages_folder() / key if key else None
    return folder if folder and folder.is_dir() else None


def _json(folder: Path | None, name: str) -> Any:
    path = folder / name if folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else None


def _errors(row: Row) -> list[dict[str, Any]] | None:
    """Wrongly read val lines; None where nothing wrote them down."""
    found: list[dict[str, Any]] | None = _json(
        _folder(row, "int8" if "int8" in row else "export"), ERRORS
    )
    return found


def _point(row: Row, baseline: set[int]) -> dict[str, Any]:
    errors = _errors(row)
    newly = [e for e in errors or [] if e["index"] not in baseline]
    shown = None
    if errors is not None:
        half = _spread(newly, SHOWN_ERRORS // 2)
        others = [e for e in errors if e["index"] in baseline]
        shown = [
            {**e, "new": e["index"] not in baseline}
            for e in half + _spread(others, SHOWN_ERRORS - len(half))
        ]
    return {
        "point": row["point"],
        "kept": (_json(_folder(row, "prune"), WIDTHS) or {})
        if "int8" not in row and "control" not in row
        else {},
        "errors": shown,
        "wrong": len(errors or []),
        "newly_wrong": len(newly),
    }


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most so many of them, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[place] for place in places]


def _channels(sparse: Path | None) -> dict[str, int]:
    channels: dict[str, int] = (_json(sparse, cache.READINESS) or {"channels": {}})["channels"]
    return channels


def _gammas(folder: Path | None) -> list[dict[str, Any]]:
    """Histogram of |gamma| over all layers, epoch by epoch."""
    files = sorted((folder / cache.GAMMAS).glob("epoch-*.npz")) if folder else []
    found = []
    for path in _spread(files, MAX_EPOCHS):
        with np.load(path) as arrays:
            values = np.concatenate([arrays[name] for name in arrays.files])
        counts = np.histogram(values.clip(0, 1), BINS, (0, 1))[0]
        found.append(
            {
                "epoch": int(path.stem.removeprefix("epoch-")),
                "shares": [round(float(count) / len(values), 5) for count in counts],
                "zero": float((values == 0).mean()),
            }
        )
    return found


def _curves(rows: Sequence[Row], base: Path | None, sparse: Path | None) -> dict[str, Any]:
    """Accuracy and loss after each epoch of every training, by what it is called."""
    folders = {"baseline": base, "sparse": sparse}
    for row in rows[1:]:
        last = "qat" if "int8" in row else row.get("control", "finetune")
        folders[row["point"]] = _folder(row, last)
    found = {}
    for name, folder in folders.items():
        if folder and (records := cache.history(folder)):
            found[name] = {
                figure: [round(factor * record[metric], 4) for record in records]
                for figure, (metric, factor) in CURVES.items()
            }
    return found


def _images(experiment: Experiment, indices: Sequence[int]) -> dict[int, str]:
    """Val lines as the network sees them, for an img element."""
    val = open_source(experiment.data, "val", experiment.seed)
    found = {}
    for index in indices:
        buffer = io.BytesIO()
        fit_line(val.image(index), experiment.data.max_width).save(buffer, "jpeg", quality=85)
        found[index] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found


def _texts(experiment: Experiment, rows: Sequence[Row], computed: Sequence[str]) -> dict[str, str]:
    """What is folded away: settings, provenance, time, data check, the layers of the networks."""
    pretty = partial(json.dumps, indent=1, ensure_ascii=False)
    keys = {key for row in rows for key in row["stages"].values()}
    manifests = [
        m for key in sorted(keys) if (m := _json(project.stages_folder() / key, cache.MANIFEST))
    ]
    spent = sum(m["seconds"] for m in manifests if m["label"] in computed)
    saved = sum(m["seconds"] for m in manifests) - spent
    lines = [
        f"{m['seconds']:9.1f} s  {'computed' if m['label'] in computed else 'cached'}  {m['label']}"
        for m in manifests
    ]
    time = f"{spent:.0f} s computed by this run, {saved:.0f} s saved by the cache\n" + "\n".join(
        lines
    )
    summaries = {
        f"layers of {row['point']}": _summary(row)
        for row in rows
        if "int8" not in row and _summary(row)
    }
    return {
        "settings": pretty(experiment.model_dump(mode="json", exclude={"execution", "notify"})),
        "stages and their keys": pretty(
            {"commit": project.git_commit(), **{r["point"]: r["stages"] for r in rows}}
        ),
        "time": time,
        "data check": pretty(_json(_folder(rows[0], "data"), "check.json")),
        **summaries,
    }


def _summary(row: Row) -> str:
    folder = _folder(row, row.get("control", "prune")) or _folder(row, "baseline")
    path = folder / SUMMARY if folder else None
    return path.read_text(encoding="utf-8") if path and path.exists() else ""
