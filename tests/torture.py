"""Faults that really happen, at random moments, against real pipelines: `make torture`.

    python -m tests.torture [SEED]

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from tests.flows.conftest import LONG, Project, free_port, new_project, serve_prefect, wait_for

KILLS, CANCELS, ARTIFACTS, INPUTS = 40, 10, 100, 200
STAGES = ("data", "baseline", "sparse", "prune", "finetune", "measure")


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


def main() -> None:
    """Run every fault and print the table."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    say(f"seed {seed}")
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, serve_prefect(Path(folder)):
        reference = new_project(Path(folder) / "reference", **LONG)
        reference.frontier()
        outcomes = [
            fault(Path(folder) / fault.__name__, reference, chance)
            for fault in (
                kills,
                cancels,
                artifact_faults,
                hostile_inputs,
                two_at_once,
                eight_at_once,
                mlflow_outage,
                full_disk,
            )
        ]
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


def start(project: Project) -> subprocess.Popen[str]:
    log = (project.folder / "log.txt").open("a")
    command = project.command("frontier", str(project.params))
    return subprocess.Popen(command, stdout=log, stderr=log, **project.options())


def workers_of(project: Project) -> dict[str, int]:
    """Process of each stage that is being computed now, by stage."""
    found = subprocess.run(["pgrep", "-af", "flows.worker"], capture_output=True, text=True)
    pattern = re.compile(rf"^(\d+) .*{re.escape(str(project.home))}/work/(\w+)-\w+/job.json$", re.M)
    return {stage: int(pid) for pid, stage in pattern.findall(found.stdout)}


def wait_for_stage(project: Project, process: subprocess.Popen[str], stage: str) -> int | None:
    """Process that computes a stage; None where the pipeline ended first."""
    while process.poll() is None:
        if stage in (workers := workers_of(project)):
            return workers[stage]
        time.sleep(0.05)
    return None


def finish(project: Project, reference: Project, outcome: Outcome) -> None:
    """Let the pipeline end, and compare everything with the one that was left alone."""
    process = start(project)
    code = process.wait(timeout=300)
    outcome.check(code == 0, f"the run after it ended with code {code}, see {project.folder}")
    if code:
        return
    for label in reference.manifests():
        if label.startswith("measure") or label == "data":
            continue
        outcome.check(weights(project, label) == weights(reference, label), f"{label}: other bits")
    outcome.lost += lost_steps(project)


def weights(project: Project, label: str) -> dict[str, bytes]:
    folder = project.home / "stages" / project.manifests()[label]["key"]
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def lost_steps(project: Project) -> Iterator[str]:
    """What MLflow does not have exactly once, finished."""
    uri = project.environment.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(uri or f"sqlite:///{project.home / 'mlflow' / 'mlflow.db'}")
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
    """kill -9 of the pipeline or of a stage's process, over all stages."""
    outcome = Outcome("kill -9 of pipeline or stage")
    while outcome.tried < KILLS:
        project = new_project(folder / str(outcome.tried), **LONG)
        for stage in STAGES:
            process = start(project)
            worker = wait_for_stage(project, process, stage)
            if worker is None:
                break
            time.sleep(chance.uniform(0, 6 if stage in ("baseline", "sparse", "finetune") else 3))
            victim = chance.choice([process.pid, worker])
            with suppress(ProcessLookupError):  # It ended by itself just now.
                os.kill(victim, signal.SIGKILL)
            outcome.tried += 1
            gone = time.monotonic()
            process.wait(30)
            while workers_of(project) and time.monotonic() - gone < 30:
                time.sleep(0.05)
            outcome.longest = max(outcome.longest, time.monotonic() - gone)
            say(f"kill {outcome.tried} in {stage}")
        finish(project, reference, outcome)
        shutil.rmtree(project.folder)
    return outcome


def cancels(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """Ctrl-C, SIGTERM and a cancel in Prefect stop everything within five seconds."""
    outcome = Outcome("Ctrl-C, SIGTERM, cancel in Prefect")
    project = new_project(folder, **LONG)
    ways: list[Callable[[subprocess.Popen[str]], object]] = [
        lambda process: process.send_signal(signal.SIGINT),
        lambda process: process.send_signal(signal.SIGTERM),
        lambda process: cancel_in_prefect(),
    ]
    while outcome.tried < CANCELS:
        process = start(project)
        stage = chance.choice(["baseline", "sparse", "finetune"])
        if wait_for_stage(project, process, stage) is None:
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
        code = process.wait(60)
        outcome.check(code in (130, 143), f"exit code {code}")
        running = [status for status in statuses(project) if status == "RUNNING"]
        outcome.check(not running, f"{len(running)} MLflow runs still RUNNING")
        say(f"cancel {outcome.tried} in {stage}: {seconds:.1f} s")
    finish(project, reference, outcome)
    return outcome


def cancel_in_prefect() -> None:
    """Ask for the cancel of the newest running flow, as the button in Prefect's page does."""
    code = (
        "from prefect.client.orchestration import get_client\n"
        "from prefect.client.schemas.filters import FlowRunFilter\n"
        "from prefect.states import Cancelling\n"
        "with get_client(sync_client=True) as client:\n"
        "    only = FlowRunFilter(state={'type': {'any_': ['RUNNING']}})\n"
        "    for run in client.read_flow_runs(flow_run_filter=only):\n"
        "        client.set_flow_run_state(run.id, Cancelling())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def statuses(project: Project) -> list[str]:
    client = MlflowClient(f"sqlite:///{project.home / 'mlflow' / 'mlflow.db'}")
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
    whole = new_project(folder / "whole", **LONG)
    for label in ("sparse", "finetune 0.6"):
        shutil.copytree(reference.home, whole.home, dirs_exist_ok=True)
        key = whole.manifests()[label]["key"]
        damage(whole.home / "stages" / key / "model.safetensors", chance)
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
    project = new_project(folder, **LONG)
    first, second = start(project), start(project)
    worker = wait_for_stage(project, first, "sparse")
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
    codes = sorted(process.wait(300) for process in (first, second))
    outcome.check(codes == [-signal.SIGKILL, 0], f"exit codes {codes}")
    finish(project, reference, outcome)
    return outcome


def eight_at_once(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """Eight pipelines on a fresh state folder compute each stage once."""
    outcome = Outcome("eight pipelines on a fresh store", tried=8)
    project = new_project(folder, **LONG)
    command = project.command("frontier", str(project.params), "--json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    group = [subprocess.Popen(command, **pipes, **project.options()) for _ in range(8)]
    printed = [process.communicate(timeout=600) for process in group]
    for process, (_, error) in zip(group, printed, strict=True):
        outcome.check(process.returncode == 0, error[-300:])
    computed = [label for out, _ in printed if out for label in json.loads(out)["computed"]]
    outcome.check(len(computed) == len(set(computed)), f"computed twice: {sorted(computed)}")
    finish(project, reference, outcome)
    return outcome


def mlflow_outage(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """The MLflow server dies while a stage trains, and is back before the next run."""
    outcome = Outcome("MLflow server gone in mid-training", tried=1)
    project = new_project(folder, **LONG)
    port = free_port()
    project.environment = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with serve_mlflow(folder, port):
        process = start(project)
        wait_for_stage(project, process, "sparse")
        time.sleep(3)
    code = process.wait(300)
    outcome.check(code == 0, f"the run ended with code {code}")
    with serve_mlflow(folder, port):
        finish(project, reference, outcome)
    return outcome


@contextmanager
def serve_mlflow(folder: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def full_disk(folder: Path, reference: Project, chance: random.Random) -> Outcome:
    """A disk that fills up at some write, more space each time, until the run ends."""
    outcome = Outcome("disk full")
    small = folder / "small"
    small.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        return outcome
    try:
        project = new_project(small / "project", **LONG)
        project.environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
        size = 200
        while (code := start(project).wait(300)) != 0:
            outcome.tried += 1
            outcome.check(code == 2, f"exit code {code} at {size} kB")
            size += chance.randrange(50, 250)
            options = f"remount,size={size}k"
            subprocess.run(["mount", "-o", options, str(small)], check=True)
        finish(project, reference, outcome)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    return outcome


if __name__ == "__main__":
    main()
