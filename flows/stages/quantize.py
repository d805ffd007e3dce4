"""The stages behind a network in 8 bits: quantizing an export, and training for it."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from crnn.checkpoint import load_checkpoint
from crnn.data.batches import Batch, evaluation_batches, training_batches
from crnn.evaluation import score
from crnn.fake_quantization import fake_quantized
from crnn.metrics import word_accuracy
from crnn.quantization import layers_of, quantize
from crnn.reading import Reader
from crnn.settings import QuantizeSettings
from flows.cache import MODEL, ONNX
from flows.stages.export import opened, pixels_of, read_exported, write_errors
from flows.stages.training import train
from flows.stages.work import Outcome, Work
from pruning.coupling import groups_of

Quantize = Callable[[Sequence[str]], Reader]
"""Quantizes the layers of these names and opens the outcome."""


def int8(work: Work) -> Outcome:
    """Quantize an export, but for the layers that the budget on accuracy leaves in float.

    The budget is on training lines, augmented so that they are not known by heart: what the val
    lines say of an int8 network is as unseen as for any other.
    """
    settings = QuantizeSettings.model_validate(work.settings["quantize"])
    path, train_lines = work.input("export"), work.lines("train")
    exact = opened(path)
    plain = evaluation_batches(train_lines.sample(settings.calibration_lines))
    calibration = [pixels_of(batch) for batch in plain]
    # Without loader processes: each batch that is kept would keep their files open.
    sample = replace(train_lines.sample(settings.judged_lines), workers=0)
    judged = list(training_batches(sample, settings, work.seed, 0))
    truth = _accuracy(exact, judged)
    target = work.out / ONNX

    def quantized(layers: Sequence[str]) -> Reader:
        quantize(path, target, calibration, layers)
        return opened(target)

    def drop(reader: Reader) -> float:
        return points_lost(truth, _accuracy(reader, judged))

    def distance(reader: Reader) -> float:
        return _distance(exact, reader, judged[:2])

    every = layers_of(path)
    layers, lost = _within_budget(every, quantized, drop, distance, settings.max_drop)
    if not layers:
        shutil.copyfile(path, target)
    left = [layer for layer in every if layer not in layers]
    work.write_json("layers.json", {"int8": layers, "float": left})
    found = read_exported(opened(target), evaluation_batches(work.lines("val")))
    write_errors(work, found)
    return ONNX, {
        **score(found, work.unseen()),
        "quantize/drop": lost,
        "quantize/layers": float(len(layers)),
        "quantize/layers_in_float": float(len(left)),
        "quantize/bytes": float(target.stat().st_size),
    }


def points_lost(before: float, after: float) -> float:
    """Points of word accuracy, so rounded that a budget is not missed by a float's last bit."""
    return round(100 * (before - after), 9)


def _within_budget(
    layers: list[str],
    quantized: Quantize,
    drop: Callable[[Reader], float],
    distance: Callable[[Reader], float],
    max_drop: float,
) -> tuple[list[str], float]:
    """The layers to quantize: all, or without those that disturb most until the rest costs little.

    Returns:
        Their names, and the points of word accuracy that they cost.
    """
    if (lost := drop(quantized(layers))) <= max_drop:
        return layers, lost
    disturbs = {layer: distance(quantized([layer])) for layer in layers}
    chosen = sorted(layers, key=lambda layer: disturbs[layer])
    while chosen:
        chosen.pop()
        in_order = [layer for layer in layers if layer in chosen]
        if chosen and (lost := drop(quantized(in_order))) <= max_drop:
            return in_order, lost
    return [], 0.0


def _accuracy(reader: Reader, batches: Sequence[Batch]) -> float:
    readings = read_exported(reader, batches)
    return word_accuracy([r.text for r in readings], [r.label for r in readings])


def _distance(exact: Reader, reader: Reader, batches: Sequence[Batch]) -> float:
    """Mean change of the largest probability of a frame."""
    changes = [
        np.abs(exact.best_path(pixels_of(b))[0] - reader.best_path(pixels_of(b))[0]).mean()
        for b in batches
    ]
    return float(np.mean(changes))


def qat(work: Work) -> Outcome:
    """Train a network on while it computes as if it were in 8 bits."""
    settings = QuantizeSettings.model_validate(work.settings["train"])
    model = load_checkpoint(work.input("model")).model
    groups_of(model)  # Known from here on: they cannot be found while weights are rounded.
    with fake_quantized(model):
        metrics = train(work, model, settings)[1]
    return MODEL, metrics
