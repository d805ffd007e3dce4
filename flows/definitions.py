"""The stages of an experiment, each as a function of what is upstream of it.

Used by the pipeline, which computes them, and by the preview, which only looks them up.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crnn.charset import Charset
from crnn.data import images
from crnn.data.sources import Dataset, Shards, open_source
from crnn.errors import CheckpointError, DataError, PassingError, SettingsError, Stopping, never
from crnn.files import sha256, write_atomic
from crnn.settings import (
    VGG13,
    BaselineSettings,
    DataSettings,
    ExportSettings,
    ModelSettings,
    QuantizeSettings,
    Settings,
    TeacherSettings,
    TrainSettings,
)
from flows import display, project
from flows.cache import Manifest, Stage
from flows.experiment import Experiment
from flows.rows import BEST, CHAMPION, EXPORTED, TIMED_THREADS, TRAINED, Variant

Upstream = dict[str, Manifest]
"""Finished stages by the name of what they are to the next one."""

TEACHER = "teacher"

SHARING = ("prune", "finetune", "scratch", "small", "export", "int8", "qat")
"""Stages that run side by side; each of the others has all cores to itself."""

TRAINING = ("baseline", "sparse", "finetune", "scratch", "small", "qat")
"""Stages that can train on several processes."""

VERSIONS = {
    "data": 4,
    "baseline": 5,
    "sparse": 6,
    "target": 5,
    "prune": 7,
    "finetune": 3,
    "scratch": 5,
    "small": 5,
    "export": 3,
    "int8": 8,
    "qat": 6,
    "judge": 3,
    "measure": 4,
    "latency": 2,
}
"""Raise a stage's number when a change of its code changes its result."""


def data_stage(experiment: Experiment, stopping: Stopping = never) -> Stage:
    """Check and index of the samples. Its identity is their content, not their place.

    Args:
        experiment: Its definition.
        stopping: Asked while new samples are read; StoppedError once it says so.
    """
    settings = experiment.data
    charset = given_charset(settings)
    content = {
        "charset": charset.characters if charset else "",
        "fingerprint": fingerprint(experiment, stopping),
        "images": images.VERSION,
        "max_width": settings.max_width,
        "on_bad_sample": settings.on_bad_sample,
    }
    return Stage("data", "data", content, {}, VERSIONS["data"])


def given_charset(settings: DataSettings) -> Charset | None:
    """The charset of the file; None where the training labels give it."""
    if not settings.charset:
        return None
    try:
        return Charset.load(Path(settings.root) / settings.charset)
    except DataError as error:
        mend = "mend data.charset, or leave it out to take the characters of the training labels"
        raise DataError(f"{error}; {mend}") from error


def of_seed(experiment: Experiment, seed: int) -> str:
    """What tells the stages of one seed from another's, behind their names."""
    return f" seed {seed}" if len(experiment.training_seeds) > 1 else ""


def teacher_stage(
    experiment: Experiment, teacher: TeacherSettings, data: Manifest, seed: int
) -> Stage:
    """The network that teaches; one and the same with the baseline that another one may be."""
    settings = _initial(teacher, teacher.model, seed)
    label = f"{TEACHER}{of_seed(experiment, seed)}"
    return Stage("baseline", label, settings, {"data": data}, VERSIONS["baseline"])


def baseline_stage(experiment: Experiment, upstream: Upstream, seed: int) -> Stage:
    """The uncut network, trained from scratch or from a checkpoint, whose content counts.

    Args:
        experiment: Its definition.
        upstream: The stages "data" and, where there is one, "teacher".
        seed: Of weights, data order and augmentation.
    """
    settings = _initial(experiment.baseline, experiment.model, seed)
    inputs = _taught(upstream, ["data"], experiment.baseline.distill or 0)
    label = f"baseline{of_seed(experiment, seed)}"
    return Stage("baseline", label, settings, inputs, VERSIONS["baseline"])


def _initial(section: BaselineSettings, model: ModelSettings, seed: int) -> dict[str, Any]:
    """Settings of a training that starts with fresh weights or a checkpoint."""
    settings = _training(section, seed)
    settings["train"].pop("model", None)
    if section.checkpoint is None:
        return {**settings, "model": _dump(model)}
    return {**settings, "checkpoint": _digest_of_file(Path(section.checkpoint))}


def checkpoint_of(experiment: Experiment, stage: Stage) -> str | None:
    """Path of the checkpoint that a stage starts from.

    Raises:
        PassingError: It is no longer the one that the stage's key was made of.
    """
    if (digest := stage.settings.get("checkpoint")) is None:
        return None
    paths = checkpoints(experiment)
    for path in paths:
        if _digest_of_file(Path(path)) == digest:
            return path
    raise PassingError(
        f"{', '.join(paths)} was changed while the pipeline ran; run again to start from what it"
        " is now"
    )


def checkpoints(experiment: Experiment) -> list[str]:
    """Paths of all checkpoints that an experiment starts from."""
    sections = [section for section in (experiment.baseline, experiment.teacher) if section]
    return [section.checkpoint for section in sections if section.checkpoint is not None]


def _taught(upstream: Upstream, names: list[str], weight: float) -> Upstream:
    """Those inputs of a stage, and the teacher where the stage is taught and there is one."""
    teacher = ["teacher"] if weight and "teacher" in upstream else []
    return {name: upstream[name] for name in names + teacher}


def sparse_stage(experiment: Experiment, upstream: Upstream, seed: int) -> Stage:
    """The uncut network under a sparsity penalty. One serves every ratio.

    Args:
        experiment: Its definition.
        upstream: The stages "data", "baseline" and, where there is one, "teacher".
        seed: Of data order and augmentation, and of weights where it does not start from the
            baseline.
    """
    settings = _training(experiment.sparse, seed)
    if experiment.sparse.method != "auto":
        del settings["train"]["target_ratio"]  # It sets nothing there.
    if not experiment.sparse.drop_branches:
        del settings["train"]["drop_branches"]  # Older keys do not have it.
    names = ["data", "baseline"]
    if not experiment.sparse.from_baseline:
        names.remove("baseline")
        settings["model"] = _dump(experiment.model)
    inputs = _taught(upstream, names, experiment.sparse.distill)
    label = f"sparse{of_seed(experiment, seed)}"
    return Stage("sparse", label, settings, inputs, VERSIONS["sparse"])


def target_stage(
    experiment: Experiment, sparse: Manifest, kind: str, value: float, seed: int
) -> Stage:
    """The ratio that meets a target."""
    pruning = _pruning(experiment)
    for name in ("compensate", "calibration_lines"):  # Of the lines a cut reads: none is read here.
        del pruning[name]
    settings = {"prune": pruning, "kind": kind, "value": value}
    label = f"target {point_of_target(kind, value)}{of_seed(experiment, seed)}"
    return Stage("target", label, settings, {"sparse": sparse}, VERSIONS["target"])


def point_of_target(kind: str, value: float) -> str:
    """Name of a target's point of the frontier."""
    return f"{kind} {value:,.10g}"


def prune_stage(
    experiment: Experiment, data: Manifest, sparse: Manifest, ratio: float, seed: int
) -> Stage:
    """The network with the channels of one ratio, and all else that the settings say, cut out."""
    settings = {"prune": _pruning(experiment), "basis_points": round(10_000 * ratio)}
    inputs = {"data": data, "sparse": sparse}
    label = f"prune {ratio:g}{of_seed(experiment, seed)}"
    return Stage("prune", label, settings, inputs, VERSIONS["prune"])


def finetune_stage(experiment: Experiment, upstream: Upstream, ratio: float, seed: int) -> Stage:
    """The cut network, trained on.

    Args:
        experiment: Its definition.
        upstream: The stages "data", "prune", "baseline" and, where there is one, "teacher".
        ratio: Of the cut.
        seed: Of data order and augmentation.
    """
    settings = _training(experiment.finetune, seed)
    distill = experiment.finetune.distill
    by_baseline = ["baseline"] if distill and "teacher" not in upstream else []
    inputs = _taught(upstream, ["data", "prune", *by_baseline], distill)
    label = f"finetune {ratio:g}{of_seed(experiment, seed)}"
    return Stage("finetune", label, settings, inputs, VERSIONS["finetune"])


def control_stage(experiment: Experiment, kind: str, upstream: Upstream, seed: int) -> Stage:
    """A network that was not slimmed, trained with the multiply-adds of one that was.

    The schedule is the baseline's (batch size, learning rate, weight decay, augmentation,
    precision) but for the number of epochs, which flows.stages.controls derives from those on the
    slimming path. The baseline is on it where the sparse stage starts from it or fine-tuning is
    taught by it. What went into a baseline.checkpoint before this experiment is not counted, as
    nobody knows it.

    Args:
        experiment: Its definition.
        kind: "scratch" or "small".
        upstream: The stages "data", "baseline", "prune" and, where there is one, "teacher".
        seed: Of weights, data order and augmentation.
    """
    settings = _training(experiment.baseline, seed)
    uncut_epochs, inputs = 0, dict(upstream)
    epochs = settings["train"].pop("epochs")
    settings["train"].pop("distill", None)  # A control has no teacher.
    if _baseline_is_needed(experiment):
        uncut_epochs += epochs
    else:
        del inputs["baseline"]
    if experiment.sparse.from_baseline:
        uncut_epochs += experiment.sparse.epochs
    else:  # Of a network by the settings, which a baseline from a checkpoint need not be.
        settings["fresh_epochs"] = experiment.sparse.epochs
    settings |= {
        "uncut_epochs": uncut_epochs,
        "taught_epochs": _taught_epochs(experiment),
        "cut_epochs": experiment.finetune.epochs,
    }
    if experiment.teacher:
        settings["teacher_epochs"] = experiment.teacher.epochs
    ratio = upstream["prune"].settings["basis_points"] / 10_000
    label = f"{kind} {ratio:g}{of_seed(experiment, seed)}"
    return Stage(kind, label, settings, inputs, VERSIONS[kind])


def _baseline_is_needed(experiment: Experiment) -> bool:
    """Whether slimming takes the baseline, to start from it or to be taught by it."""
    finetune = experiment.finetune
    taught = finetune.epochs and finetune.distill and not experiment.teacher
    return bool(experiment.sparse.from_baseline or taught)


def _taught_epochs(experiment: Experiment) -> int:
    """Epochs of a slimming path in which a teacher read along."""
    sparse, finetune, baseline = experiment.sparse, experiment.finetune, experiment.baseline
    in_sparse = sparse.distill and (sparse.from_baseline or experiment.teacher)
    return (
        (sparse.epochs if in_sparse else 0)
        + (finetune.epochs if finetune.distill else 0)
        + (baseline.epochs if baseline.distill and sparse.from_baseline else 0)
    )


def export_stage(settings: ExportSettings, stages: Upstream) -> Stage:
    """A network as a file for other runtimes, read against the val lines.

    Args:
        settings: What the file is like.
        stages: Those behind a point, the one that made the network last. Where there was a cut,
            its ratio goes into the file's metadata.
    """
    model, pruned = list(stages.values())[-1], stages.get("prune")
    origin: dict[str, Any] = {"stage": model.stage, "key": model.key}
    if pruned and "small" not in stages:  # That one is as small as a cut, and uncut.
        origin["ratio"] = pruned.settings["basis_points"] / 10_000
    shape = _dump(settings)
    if not settings.pt2:
        del shape["pt2"]  # Older keys do not have it.
    content = {"export": shape, "of": origin}
    inputs = {"data": stages["data"], "model": model}
    return Stage("export", f"export {model.label}", content, inputs, VERSIONS["export"])


def int8_stage(settings: QuantizeSettings, exported: Variant, seed: int) -> Stage:
    """An export in 8 bits; seed is of the augmentation of the lines to judge by."""
    judging = {"max_drop", "calibration_lines", "judged_lines", "batch_size", "augment"}
    content = {"seed": seed, "quantize": settings.model_dump(mode="json", include=judging)}
    label = f"int8 {exported.model.label}"
    return Stage("int8", label, content, _files(exported, ["data", "export"]), VERSIONS["int8"])


def qat_stage(settings: QuantizeSettings, network: Variant, seed: int) -> Stage:
    """A network, trained on for 8 bits; seed is of data order and augmentation."""
    judging = {"max_drop", "calibration_lines", "judged_lines"}
    content = {"seed": seed, "train": settings.model_dump(mode="json", exclude=judging)}
    label = f"qat {network.model.label}"
    return Stage("qat", label, content, _files(network, ["data", "model"]), VERSIONS["qat"])


def judge_stage(data: Manifest, exported: Manifest) -> Stage:
    """An export of other data, read on these val lines."""
    inputs = {"data": data, "export": exported}
    return Stage("judge", f"judge {exported.label}", {}, inputs, VERSIONS["judge"])


def measure_stage(network: Variant) -> Stage:
    """Cost of a network, and of its file where there is one."""
    inputs = _files(network, ["model", "export"])
    return Stage("measure", f"measure {network.label}", {}, inputs, VERSIONS["measure"])


def latency_stage(experiment: Experiment, networks: Sequence[Variant], seed: int) -> Stage:
    """All networks of a seed, timed side by side; seed is in the label alone.

    Of all stages the timing alone has the machine in its key: its result is about that machine.
    """
    trained = {f"{TRAINED} {n.point}": n.model for n in networks if not n.is_int8}
    exported = {f"{EXPORTED} {n.point}": n.exported for n in networks if n.exported}
    return _timing(f"latency{of_seed(experiment, seed)}", {**trained, **exported})


def duel_stage(champion: Manifest, best: Manifest) -> Stage:
    """The champion's file and another, timed side by side."""
    names = {f"{EXPORTED} {CHAMPION}": champion, f"{EXPORTED} {BEST}": best}
    return _timing(f"latency {champion.label} and {best.label}", names)


def _timing(label: str, networks: Upstream) -> Stage:
    settings = {
        "timed_on": project.timing_ground(),
        "threads": [count for count in TIMED_THREADS if count <= len(project.cores())],
    }
    return Stage("latency", label, settings, networks, VERSIONS["latency"])


def _files(network: Variant, names: list[str]) -> Upstream:
    """Inputs of a stage that ships a network."""
    made = {"data": network.stages["data"], "model": network.model, "export": network.exported}
    return {name: manifest for name in names if (manifest := made[name])}


def _training(section: TrainSettings, seed: int) -> dict[str, Any]:
    return {"seed": seed, "train": _dump(section)}


def _pruning(experiment: Experiment) -> dict[str, Any]:
    settings = _dump(experiment.prune)
    for name in ("lstm_ratio", "head_rows"):
        if not settings[name]:
            del settings[name]  # It sets nothing there, and older keys do not have it.
    return settings


def _dump(settings: Settings) -> dict[str, Any]:
    """Settings as JSON; paths, targets (a stage of their own) and what is not set left out."""
    return settings.model_dump(mode="json", exclude={"checkpoint", "targets"}, exclude_none=True)


def _digest_of_file(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint file at {path}; set baseline.checkpoint or teacher.checkpoint"
        )
    return sha256(path)


def open_sources(experiment: Experiment) -> list[Dataset | Shards]:
    """Both splits, not yet read.

    Raises:
        DataError: A place without data, or a charset that cannot be used.
        CheckpointError: No checkpoint where the settings name one.
    """
    sources = [open_source(experiment.data, s, experiment.seed) for s in ("train", "val")]
    given_charset(experiment.data)
    for model in (experiment.model, *([experiment.teacher.model] if experiment.teacher else [])):
        if model.backbone != VGG13:
            _refuse_backbone(model)
    for path in checkpoints(experiment):
        _digest_of_file(Path(path))
    checkpoint = experiment.baseline.checkpoint if experiment.sparse.from_baseline else None
    if experiment.controls.small and checkpoint:
        _refuse_without_width(checkpoint)
    return sources


def _refuse_without_width(checkpoint: str) -> None:
    """Raise a SettingsError where a checkpoint's network has no narrower ones beside it."""
    from crnn.checkpoint import load_checkpoint

    backbone = load_checkpoint(Path(checkpoint)).model.settings.backbone
    if backbone != VGG13:
        raise SettingsError(
            f"controls.small needs a width factor, which {VGG13} alone has; {checkpoint} is"
            f" {backbone}"
        )


def _refuse_backbone(settings: ModelSettings) -> None:
    """Raise a SettingsError where a network of timm cannot serve, before anything is started."""
    import torch

    from crnn.networks.recogniser import Recogniser

    with torch.device("meta"):
        Recogniser(settings, 2)


def fingerprint(experiment: Experiment, stopping: Stopping = never) -> str:
    """SHA-256 over labels and images of both splits.

    Memoised by name, size and modification time of every file, for each file of labels or
    shard, so that unchanged data is not read again.

    Args:
        experiment: Its definition.
        stopping: Asked while samples are read; StoppedError once it says so.
    """
    place = str(Path(experiment.data.root).resolve())
    digests = []
    for split in ("train", "val"):
        source = open_source(experiment.data, split, experiment.seed)
        if isinstance(source, Shards):
            shards = [_remembered(shard, place, stopping) for shard in source.shards]
            digests.append(_digest(shards))
        else:
            digests.append(_remembered(source, place, stopping))
    return _digest(digests)


def _remembered(part: Dataset, place: str, stopping: Stopping) -> str:
    """SHA-256 over labels and images of a split or a shard."""
    memo = project.home() / "fingerprints" / f"{_digest([place, part.stamp()])}.json"
    try:
        return str(json.loads(memo.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        display.say(f"data: reading {len(part)} samples that are new or have changed")
        digest = part.digest(stopping)
        write_atomic(memo, json.dumps(digest).encode())
        return digest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
