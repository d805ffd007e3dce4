"""Finished stages on disk: their keys, their manifests, and proof at a hit.

A stage's result is a folder that appears by one rename, its manifest inside. A hit is believed
only after every file has been hashed; what fails is set aside and computed again.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crnn.files import sha256, sync, write_atomic
from flows import project, store

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
"""Digest of the rest of a manifest, in the manifest: its figures are believed as its files are."""

LINES = "lines.safetensors"
MODEL = "model.safetensors"
ONNX = "model.onnx"
PT2 = "model.pt2"
HISTORY = "history.jsonl"
STATE = "state.safetensors"
GAMMAS = "gammas"
SNAPSHOTS = "snapshots"
WIDTHS = "widths.json"
SUMMARY = "summary.txt"
ERRORS = "errors.json"
READINESS = "readiness.json"


class DamagedError(Exception):
    """A finished stage whose files are not what its manifest says."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline, as what its result is a function of, and a label.

    Attributes:
        name: Kind of stage: "baseline", "prune", ...
        label: What a person calls this one: "prune 0.62".
        settings: All that shapes the result, as JSON values.
        inputs: Manifest of each upstream stage, by its name.
        version: Raised when the code of the stage gives another result.
    """

    name: str
    label: str
    settings: dict[str, Any]
    inputs: "dict[str, Manifest]"
    version: int

    @property
    def key(self) -> str:
        """Cache key; equal keys mean equal results. It contains no dots."""
        identity = {
            "stage": self.name,
            "settings": self.settings,
            "inputs": {name: manifest.digest for name, manifest in self.inputs.items()},
            "version": self.version,
        }
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{self.name}-{hashlib.sha256(canonical.encode()).hexdigest()[:20]}"


@dataclass(frozen=True)
class Manifest:
    """What a finished stage left, small enough to pass between tasks.

    Attributes:
        key: Cache key of the stage.
        stage: Kind of stage.
        label: What a person calls it.
        result: Name of the file that later stages read; its SHA-256 enters their keys.
        files: Size in bytes and SHA-256 of every file, by name.
        metrics: Final figures.
        settings: As in the stage.
        inputs: Keys of the upstream stages.
        run_id: MLflow run of the stage, or None where it was not known yet: no stage waits for it.
        seconds: Time it took, over all attempts.
    """

    key: str
    stage: str
    label: str
    result: str
    files: dict[str, dict[str, Any]]
    metrics: dict[str, float]
    settings: dict[str, Any]
    inputs: dict[str, str]
    run_id: str | None
    seconds: float

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return project.stages_folder() / self.key

    @property
    def digest(self) -> str:
        """SHA-256 of the result file."""
        return str(self.files[self.result]["sha256"])

    def file(self, name: str) -> Path:
        """Path of one of the files."""
        return self.folder / name


def find(key: str, log: Callable[[str], None]) -> Manifest | None:
    """The manifest of a finished stage, proven by its files; None where there is none.

    A damaged result is moved out of the way, and log is told which and why. Where machines share
    their stages, what is in the store counts, and is fetched.
    """
    folder = project.stages_folder() / key
    found = _found_here(folder, log)
    if not store.is_shared():
        return found
    shared = store.manifest_of(key)
    if shared and found and shared == (folder / MANIFEST).read_bytes():
        return found
    fetched = _fetched(key, shared, log) if shared else None
    return fetched or (_share(found, log) if found else None)


def _found_here(folder: Path, log: Callable[[str], None]) -> Manifest | None:
    if not folder.is_dir():
        return None
    try:
        manifest = verified(folder)
    except DamagedError as damage:
        log(f"{folder.name}: {damage}; set aside as {project.set_aside(folder)} and computed again")
        return None
    with suppress(OSError):  # Of a folder that may only be read.
        os.utime(folder)  # The garbage collector leaves alone what was used lately.
    return manifest


def _share(manifest: Manifest, log: Callable[[str], None]) -> Manifest:
    """Put a stage into the store; where another machine was first, take what that one made."""
    folder, digests = manifest.folder, _digests(manifest)
    own = (folder / MANIFEST).read_bytes()
    there = store.offer(manifest.key, folder, digests, own)
    if there == own:
        return manifest
    log(f"{manifest.key}: another machine has finished it first, its result is taken")
    return _fetched(manifest.key, there, log) or manifest


def _fetched(key: str, content: bytes, log: Callable[[str], None]) -> Manifest | None:
    """Take a stage from the store, by one rename; None where what is there is damaged."""
    folder = project.stages_folder() / key
    fresh = project.work_folder() / f"fetched-{os.getpid()}-{time.time_ns()}" / key
    try:
        fresh.mkdir(parents=True)
        try:
            manifest = _parsed(content, key)
            store.fetch(_digests(manifest), fresh)  # It hashes what it writes.
            write_atomic(fresh / MANIFEST, content)
        except (DamagedError, store.DamagedFileError) as damage:
            store.forget(key)
            log(f"{key}: what is in the store is damaged ({damage}); it is shared anew")
            return None
        if folder.is_dir():
            project.set_aside(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(fresh.parent, ignore_errors=True)
    return manifest


def _digests(manifest: Manifest) -> dict[str, str]:
    return {name: str(entry["sha256"]) for name, entry in manifest.files.items()}


def verified(folder: Path) -> Manifest:
    """Read a manifest and hash every file it names.

    Raises:
        DamagedError: Anything missing, of another size or of other bytes.
    """
    try:
        manifest = _parsed((folder / MANIFEST).read_bytes(), folder.name)
    except OSError as error:
        raise DamagedError(f"manifest unreadable ({type(error).__name__})") from error
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
            raise DamagedError(f"{name} has other bytes than its manifest says")
    return manifest


def _parsed(written: bytes, key: str) -> Manifest:
    """The manifest of a stage from the bytes of its file.

    Raises:
        DamagedError: They are not those that were written, or of another stage.
    """
    try:
        content = json.loads(written)
        content.pop(SEAL, None)
        manifest = Manifest(**content)
        {(e["size"], e["sha256"]) for e in manifest.files.values()}
        manifest.digest  # noqa: B018  # The result must be among the files.
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"manifest unreadable ({type(error).__name__})") from error
    if written != _sealed(manifest):
        raise DamagedError("the manifest has other bytes than were written")
    if manifest.key != key:
        raise DamagedError(f"manifest is of another stage ({manifest.key})")
    return manifest


def publish(
    stage: Stage,
    folder: Path,
    outcome: dict[str, Any],
    run_id: str | None,
    log: Callable[[str], None],
) -> Manifest:
    """Turn a work folder's output into the stage's result, by one rename, and share it.

    Args:
        stage: The stage that was computed.
        folder: Its output files.
        outcome: `result`, `metrics` and `seconds` as the computation reported them.
        run_id: MLflow run, or None as long as it is not known.
        log: Told where another machine has finished it first.

    Returns:
        The manifest of the result that counts: this one, or that of the other machine.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
        if name != MANIFEST
    }
    manifest = Manifest(
        key=stage.key,
        stage=stage.name,
        label=stage.label,
        files=files,
        settings=stage.settings,
        inputs={name: upstream.key for name, upstream in stage.inputs.items()},
        run_id=run_id,
        **outcome,
    )
    write_atomic(folder / MANIFEST, _sealed(manifest))
    for path in (*folder.rglob("*"), folder):
        sync(path)
    target = project.stages_folder() / stage.key
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    sync(target.parent)
    return _share(manifest, log) if store.is_shared() else manifest


def _sealed(manifest: Manifest) -> bytes:
    """The bytes of a manifest's file."""
    content = asdict(manifest)
    seal = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, SEAL: seal}, indent=1).encode()


def history(out: Path) -> list[dict[str, Any]]:
    """Records of the finished epochs of a training, in the folder of its files."""
    return [json.loads(line) for line in _recorded(out)]


def finished_epochs(out: Path) -> int:
    """How many epochs of a training are recorded, whatever their records say."""
    return len(_recorded(out))


def _recorded(out: Path) -> list[bytes]:
    return (out / HISTORY).read_bytes().splitlines() if (out / HISTORY).exists() else []
