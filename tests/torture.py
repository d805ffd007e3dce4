"""Faults that really happen, at random moments, against real pipelines: `make torture`.

    python -m tests.torture [SEED [FAULT ...]]

Prints one table and exits with 1 if a bit, a step or a sample was lost. It needs a POSIX system;
the full disk needs the right to mount a tmpfs and is reported as not tried without it.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from flows.servers import free_port
from tests.flows.commands import PATIENCE
from tests.flows.conftest import (
    LONG,
    Project,
    children_of,
    client_of,
    new_project,
    serve_mlflow,
    serve_prefect,
)
from tests.flows.test_pipeline import cancelling, sending

KILLS, CANCELS, ARTIFACTS, INPUTS = 40, 10, 100, 200
STAGES = ("data", "baseline", "sparse", "prune", "finetune", "export", "int8", "measure", "latency")
TRAINING = ("baseline", "sparse", "finetune")
EXPERIMENT = {**LONG, "sparse": {**LONG["sparse"], "epochs": 12}, "export": {}}

fresh_project = partial(new_project, fresh=True, **EXPERIMENT)


@dataclass
class Outcome:
    """A row of the table.

    Attributes:
        fault: What was done.
        tried: How often.
        lost: One sentence for each time that something was lost.
        longest: Longest time until everything went on or had stopped, seconds.
    """

    fault: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    longest: float = 0.0

    def check(self, holds: bool, otherwise: str) -> None:
        """Note a loss unless the condition holds."""
        if not holds:
            self.lost.append(otherwise)


Fault = Callable[[Path, Project, random.Random], Outcome]


def main() -> None:
    """Run every fault and print the table."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    names = sys.argv[2:] or [fault.__name__ for fault in FAULTS]
    if unknown := set(names) - {fault.__name__ for fault in FAULTS}:
        sys.exit(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if fault.__name__ in names]
    say(f"seed {seed}")
    # A shell starts background jobs with SIGINT ignored, and what they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, serve_prefect(Path(folder)):
        reference = fresh_project(Path(folder) / "reference")
        reference.frontier()

        def suffer(fault: Fault) -> Outcome:
            name = fault.__name__
            try:
                outcome = fault(Path(folder) / name, reference, random.Random(f"{seed} {name}"))
            except Exception:
                outcome = Outcome(name, 1, [traceback.format_exc()])
            say(f"{outcome.fault}: {outcome.tried} tried, lost: {outcome.lost}")
            return outcome

        # The kills take as long as all the others together.
        with ThreadPoolExecutor(2) as lanes:
            outcomes = list(lanes.map(suffer, chosen))
    print_table(seed, outcomes)
    sys.exit(any(outcome.lost for outcome in outcomes))


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def print_table(seed: int, outcomes: list[Outcome]) -> None:
    table = Table(title=f"torture, seed {seed}", title_justify="left")
    for name in ("fault", "tried", "survived", "lost work", "longest take-over"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for o in outcomes:
        survived = o.tried - len(o.lost)
        table.add_row(o.fault, str(o.tried), str(survived), str(len(o.lost)), f"{o.longest:.1f} s")
    Console(width=100).print(table)
    for outcome in outcomes:
        for loss in outcome.lost:
            print(f"lost in {outcome.fault}: {loss}")


# --- processes --------------------------------------------------------------------------------


def start(project: Project, options: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    log = (project.folder / "log.txt").open("a")
    command = project.command("frontier", str(project.params))
    return subprocess.Popen(command, stdout=log, stderr=log, **(options or project.options()))


def workers_of(project: Project) -> dict[str, int]:
    """Process of each stage that is being computed now, by stage; its loaders come after it."""
    found = subprocess.run(["pgrep", "-af", "flows.worker"], capture_output=True, text=True)
    place = re.escape(str(project.home / "work"))
    pattern = re.compile(rf"^(\d+) .*{place}/(\w+)-\w+/job.json$", re.M)
    workers: dict[str, int] = {}
    for pid, stage in pattern.findall(found.stdout):
        workers.setdefault(stage, int(pid))
    return workers


def wait_for_stage(
    project: Project, process: subprocess.Popen[str], stage: str
) -> tuple[str, int] | None:
    """A stage that is computed now, this one or a later, and its process; None at the end."""
    wanted = STAGES[STAGES.index(stage) :]
    while process.poll() is None:
        for found in workers_of(project).items():
            if found[0] in wanted:
                return found
        time.sleep(0.05)
    return None


def finish(project: Project, reference: Project, outcome: Outcome) -> None:
    """Let the pipeline end, and compare everything with the one that was left alone."""
    process = start(project)
    code = process.wait(PATIENCE)
    outcome.check(code == 0, f"the run after it ended with code {code}: {last_line(project)}")
    if code:
        return
    found = digests(project)
    for label, digest in digests(reference).items():
        outcome.check(found.get(label) == digest, f"{label}: other bits")
    outcome.lost += lost_steps(project)


def digests(project: Project) -> dict[str, str]:
    """SHA-256 of the result of every stage, by label; but latencies are never the same twice."""
    return {
        label: manifest["files"][manifest["result"]]["sha256"]
        for label, manifest in project.manifests().items()
        if manifest["stage"] != "latency"
    }


def last_line(project: Project) -> str:
    return (project.folder / "log.txt").read_text().strip().splitlines()[-1]


def lost_steps(project: Project) -> Iterator[str]:
    """What MLflow does not have exactly once, finished."""
    uri = project.environment.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(uri) if uri else client_of(project)
    everywhere = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(everywhere, "tags.kind = 'stage'", max_results=1000)
    for label, manifest in project.manifests().items():
        own = [run for run in runs if run.data.tags["stage_key"] == manifest["key"]]
        if [run.info.status for run in own] != ["FINISHED"]:
            yield f"{label}: MLflow runs {[run.info.status for run in own]}"
        elif "train/loss" in manifest["metrics"]:
            epochs = manifest["settings"]["train"]["epochs"]
            steps = [m.step for m in client.get_metric_history(own[0].info.run_id, "train/loss")]
            if sorted(steps) != list(range(1, epochs + 1)):
                yield f"{label}: steps {sorted(steps)} in MLflow"


# --- faults -----------------------------------------------------------------------------------


def kills(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """kill -9 of the pipeline, of a stage's process or of its loader, over all stages."""
    outcome = Outcome("kill -9 of pipeline, stage or loader")
    while outcome.tried < KILLS:
        project = fresh_project(folder / str(outcome.tried))
        for stage in (stage for stage in STAGES for _ in range(2)):
            process = start(project)
            found = wait_for_stage(project, process, stage)
            if found is None:
                break
            reached, worker = found
            time.sleep(chance.uniform(0, 5 if reached in TRAINING else 2.5))
            killed = time.monotonic()
            victim = chance.choice([process.pid, worker, *children_of(worker)])
            with suppress(ProcessLookupError):  # It ended by itself just now.
                os.kill(victim, signal.SIGKILL)
            if process.wait(PATIENCE) == 0:
                break
            while workers_of(project):
                time.sleep(0.05)
            outcome.tried += 1
            seconds = time.monotonic() - killed
            outcome.longest = max(outcome.longest, seconds)
            orphaned = victim == process.pid and seconds >= 5
            outcome.check(not orphaned, f"a stage outlived its pipeline by {seconds:.1f} s")
            say(f"kill {outcome.tried} in {reached}")
        finish(project, reference, outcome)
        shutil.rmtree(project.folder)
    return outcome


def cancels(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """Ctrl-C, SIGTERM and a cancel in Prefect stop everything within five seconds."""
    outcome = Outcome("Ctrl-C, SIGTERM, cancel in Prefect")
    project = fresh_project(folder, name="cancels")
    ways = [sending(signal.SIGINT), sending(signal.SIGTERM), cancelling("cancels")]
    while outcome.tried < CANCELS:
        process = start(project)
        found = wait_for_stage(project, process, "baseline")
        if found is None or found[0] not in TRAINING:
            process.wait(PATIENCE)
            finish(project, reference, outcome)
            shutil.rmtree(project.home)
            continue
        time.sleep(chance.uniform(0, 4))
        if process.poll() is not None:
            continue
        ways[outcome.tried % 3](process)
        outcome.tried += 1
        sent = time.monotonic()
        while workers_of(project) and time.monotonic() - sent < 30:
            time.sleep(0.05)
        seconds = time.monotonic() - sent
        outcome.longest = max(outcome.longest, seconds)
        outcome.check(seconds < 5, f"training went on for {seconds:.1f} s")
        code = process.wait(PATIENCE)
        outcome.check(code in (130, 143), f"exit code {code}")
        running = [status for status in statuses(project) if status == "RUNNING"]
        outcome.check(not running, f"{len(running)} MLflow runs still RUNNING")
        say(f"cancel {outcome.tried} in {found[0]}: {seconds:.1f} s")
    finish(project, reference, outcome)
    return outcome


def statuses(project: Project) -> list[str]:
    client = client_of(project)
    everywhere = [e.experiment_id for e in client.search_experiments()]
    return [run.info.status for run in client.search_runs(everywhere)]


def artifact_faults(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """Files of finished stages deleted, truncated, changed in a bit, or swapped."""
    from flows import cache, project

    outcome = Outcome("artifact deleted, cut, flipped, swapped")
    os.environ["CRNN_SLIM_HOME"] = str(folder / "home")
    for _ in range(ARTIFACTS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(reference.home / "stages", project.stages_folder())
        stage = chance.choice(sorted(project.stages_folder().iterdir()))
        victim = chance.choice([p for p in sorted(stage.rglob("*")) if p.is_file()])
        damage(victim, chance)
        said: list[str] = []
        outcome.tried += 1
        found = cache.find(stage.name, said.append)
        outcome.check(found is None and len(said) == 1, f"{victim.name} was believed")
        kept = list(project.set_aside_folder().glob(f"{stage.name}-*"))
        outcome.check(len(kept) == 1, f"{stage.name} was not set aside")
    del os.environ["CRNN_SLIM_HOME"]
    whole = fresh_project(folder / "whole")
    for label in ("baseline", "sparse", "finetune 0.6"):
        shutil.copytree(reference.home, whole.home, dirs_exist_ok=True)
        stage = whole.home / "stages" / whole.manifests()[label]["key"]
        chosen = chance.choice([p for p in sorted(stage.rglob("*")) if p.is_file()])
        for victim in (chosen, *whole.home.glob("reports/*/*/frontier.json")):
            damage(victim, chance)
        finish(whole, reference, outcome)
    return outcome


def damage(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    fault = chance.choice(["delete", "truncate", "flip", "swap"]) if data else "delete"
    if fault == "delete":
        path.unlink()
    elif fault == "truncate":
        path.write_bytes(data[: chance.randrange(len(data))])
    elif fault == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(bytes(chance.randbytes(len(data))))


def hostile_inputs(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """Broken checkpoints, images, label files and experiments are refused in one sentence."""
    from crnn.checkpoint import load_checkpoint
    from crnn.data.images import decode
    from crnn.data.sources import LabelFile
    from crnn.errors import UserError
    from flows.experiment import load_experiment

    outcome = Outcome("hostile checkpoint, image, labels, YAML")
    folder.mkdir(parents=True)
    model = reference.home / "stages" / reference.manifests()["baseline"]["key"]
    image = folder / "image.png"
    write_image(image)

    def read_labels(path: Path) -> None:
        source = LabelFile(path, folder)
        for index in range(len(source)):
            source.label(index), source.image(index)

    labels = folder / "labels.txt"
    labels.write_bytes(b"image.png\tabc\nimage.png\tdef\n")
    readers: list[tuple[Path, Callable[[Path], object]]] = [
        (model / "model.safetensors", load_checkpoint),
        (image, lambda path: decode(path.read_bytes())),
        (labels, read_labels),
        (reference.params, load_experiment),
    ]
    for number in range(INPUTS):
        good, read = readers[number % len(readers)]
        victim = folder / f"hostile{good.suffix}"
        victim.write_bytes(mutated(good.read_bytes(), chance))
        outcome.tried += 1
        begun = time.monotonic()
        try:
            read(victim)
        except UserError as error:
            outcome.check("\n" not in str(error), f"more than one line: {error}")
        except Exception as error:
            outcome.lost.append(f"{good.name}: {type(error).__name__}: {error}")
        outcome.longest = max(outcome.longest, time.monotonic() - begun)
    return outcome


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The data cut, stretched, with a few bytes or a whole stretch replaced."""
    changed = bytearray(data)
    kind = chance.randrange(4)
    if kind == 0:
        return bytes(changed[: chance.randrange(len(changed))])
    if kind == 1:
        place = chance.randrange(len(changed))
        changed[place:place] = chance.randbytes(chance.randrange(1, 5000))
        return bytes(changed)
    for _ in range(chance.randrange(1, 9) if kind == 2 else 200):
        changed[chance.randrange(min(len(changed), 2000))] = chance.randrange(256)
    return bytes(changed)


def write_image(path: Path) -> None:
    from crnn.data.render import render_line
    from crnn.settings import TextSettings

    render_line(0, 0, TextSettings())[0].save(path)


def two_at_once(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """Two pipelines of the same experiment; the one that computes is killed."""
    outcome = Outcome("two pipelines, the computing one killed", tried=1)
    project = fresh_project(folder)
    first, second = start(project), start(project)
    found = wait_for_stage(project, first, "sparse")
    assert found
    worker = found[1]
    time.sleep(chance.uniform(1, 4))
    owner = int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(owner, signal.SIGKILL)
    killed = time.monotonic()
    while workers_of(project).get("sparse") in (worker, None):
        if time.monotonic() - killed > 60:
            break
        time.sleep(0.05)
    outcome.longest = time.monotonic() - killed
    outcome.check(outcome.longest < 5, f"take-over after {outcome.longest:.1f} s")
    codes = sorted(process.wait(PATIENCE) for process in (first, second))
    outcome.check(codes == [-signal.SIGKILL, 0], f"exit codes {codes}")
    finish(project, reference, outcome)
    return outcome


def eight_at_once(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """Eight pipelines on a fresh state folder compute each stage once."""
    outcome = Outcome("eight pipelines on a fresh store", tried=8)
    project = fresh_project(folder)
    command = project.command("frontier", str(project.params), "--json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    group = [subprocess.Popen(command, **pipes, **project.options()) for _ in range(8)]
    printed = [process.communicate(timeout=PATIENCE) for process in group]
    for process, (_, error) in zip(group, printed, strict=True):
        outcome.check(process.returncode == 0, error[-300:])
    computed = [label for out, _ in printed if out for label in json.loads(out)["computed"]]
    outcome.check(len(computed) == len(set(computed)), f"computed twice: {sorted(computed)}")
    finish(project, reference, outcome)
    return outcome


def mlflow_outage(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """The MLflow server dies while a stage trains, and is back before the next run."""
    outcome = Outcome("MLflow server gone in mid-training", tried=1)
    project = fresh_project(folder)
    port = free_port()
    project.environment = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with serve_mlflow(folder, port):
        process = start(project)
        wait_for_stage(project, process, "sparse")
        time.sleep(3)
    code = process.wait(PATIENCE)
    outcome.check(code == 0, f"the run ended with code {code}")
    with serve_mlflow(folder, port):
        finish(project, reference, outcome)
    return outcome


def prefect_outage(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """The pipeline's own Prefect server is killed while a stage trains."""
    outcome = Outcome("Prefect server gone in mid-training", tried=1)
    project = fresh_project(folder)
    options = project.options()
    del options["env"]["PREFECT_API_URL"]
    options["env"]["PREFECT_HOME"] = str(folder / "prefect")
    process = start(project, options)
    wait_for_stage(project, process, "sparse")
    time.sleep(chance.uniform(0, 4))
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid), "-f", "flows.server"], check=True)
    killed = time.monotonic()
    code = process.wait(PATIENCE)
    outcome.longest = time.monotonic() - killed
    outcome.check(code in (0, 2), f"exit code {code}: {last_line(project)}")
    finish(project, reference, outcome)
    return outcome


def full_disk(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """A disk that fills up at some write, more space each time, until the run ends."""
    outcome = Outcome("disk full")
    small = folder / "small"
    small.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        return outcome
    try:
        project = fresh_project(small / "project")
        project.environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
        size = 200
        while (code := start(project).wait(PATIENCE)) != 0:
            outcome.tried += 1
            outcome.check(code == 2, f"exit code {code} at {size} kB")
            size += chance.randrange(size // 4, size // 2)
            grow(small, size)
        grow(small, 2 * size)  # The log of the next run is on it too.
        finish(project, reference, outcome)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    return outcome


def grow(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


FAULTS: list[Fault] = [
    kills,
    cancels,
    artifact_faults,
    hostile_inputs,
    two_at_once,
    eight_at_once,
    mlflow_outage,
    prefect_outage,
    full_disk,
]

if __name__ == "__main__":
    main()
