"""Progress on the terminal: a bar for each running stage, a line for each finished epoch.

Everything goes to standard error; standard output is left to results. Without a terminal only
the lines are printed.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False, soft_wrap=True)


class _TimeLeft(TimeRemainingColumn):
    """Of a stage by its steps; of the sweep its sentence says more."""

    def render(self, task: Task) -> Text:
        if task.description == SWEEP:
            return Text()
        return Text.assemble(super().render(task), " left")


SWEEP = "all stages"
"""What the bar of the whole sweep is called."""

_bars = Progress(
    TextColumn("{task.description:<14}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TextColumn("{task.fields[phase]}"),
    TimeElapsedColumn(),
    _TimeLeft(),
    console=console,
)
_tasks: dict[str, TaskID] = {}
_lock = threading.Lock()


@contextmanager
def live() -> Iterator[None]:
    """Show bars while the block runs, where standard error is a terminal."""
    if not console.is_terminal:
        yield
        return
    with _bars:
        yield


def say(message: str) -> None:
    """Print one line above the bars."""
    console.print(message, markup=False)


def show(label: str, event: dict[str, Any]) -> None:
    """Show a progress event of a stage."""
    if event["event"] == "step":
        with _lock:
            if label not in _tasks:
                # Steps of earlier attempts took no time here: the estimate starts from now.
                _tasks[label] = _bars.add_task(label, total=event["steps"], phase="")
            loss = f" loss {event['loss']:.3f}" if "loss" in event else ""
            _bars.update(
                _tasks[label],
                completed=event["step"],
                total=event["steps"],
                phase=event["phase"] + loss,
            )
    elif event["event"] == "epoch":
        say(
            f"{label}: epoch {event['epoch']}/{event['epochs']}"
            f"  loss {event['train/loss']:.4f}"
            f"  word accuracy {100 * event['val/word_accuracy']:.1f}%"
            f"  NED {event['val/ned']:.4f}"
            f"  gamma near zero {100 * event['gamma/share_near_zero']:.0f}%"
            f"  {event['train/lines_per_second']:.0f} lines/s"
        )
    elif event["event"] == "notice":
        say(f"{label}: {event['message']}")
    elif event["event"] == "group":
        say(f"{label}: on {event['processes']} processes")
    elif event["event"] == "begin" and event["epoch"]:
        say(f"{label}: goes on after epoch {event['epoch']} of {event['epochs']}")


def show_sweep(done: int, of: int, sentence: str) -> None:
    """Show how far the whole sweep is, in a bar of its own."""
    with _lock:
        if SWEEP not in _tasks:
            _tasks[SWEEP] = _bars.add_task(SWEEP, phase="")
        _bars.update(_tasks[SWEEP], completed=done, total=of, phase=sentence)


def end(label: str) -> None:
    """Remove a stage's bar."""
    with _lock:
        if label in _tasks:
            _bars.remove_task(_tasks.pop(label))
