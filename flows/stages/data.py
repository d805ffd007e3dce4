"""The data stage: look at every sample, and index the usable ones."""

import csv
import json
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from crnn.charset import Charset
from crnn.data.check import Checked, check_splits, refuse_bad, refuse_empty
from crnn.data.sources import Source
from crnn.files import write_atomic
from crnn.networks.vgg import STRIDE
from flows.cache import LINES
from flows.stages.work import READING, Outcome, Work


def data(work: Work) -> Outcome:
    """Check both splits; refuse or skip what cannot be used, as the settings say."""
    given = Charset(work.settings["charset"]) if work.settings["charset"] else None
    checked = check_splits(work.data, work.job["seed"], given, STRIDE, _events(work))
    _write_check(work, checked.splits)
    if work.data.on_bad_sample == "refuse":
        refuse_bad(checked.splits)
    refuse_empty(checked.splits)
    write_atomic(work.out / "charset.txt", checked.charset.characters.encode())
    train, val = checked.splits["train"], checked.splits["val"]
    seen = _label_hashes(train.source, train.indices)
    new = ~np.isin(_label_hashes(val.source, val.indices), seen)
    reading = {
        "charset": checked.charset.characters,
        "fingerprint": work.settings["fingerprint"],
        "images": work.settings["images"],
        "max_width": work.data.max_width,
    }
    tensors = {
        "train_indices": train.indices,
        "train_widths": train.widths,
        "val_indices": val.indices,
        "val_widths": val.widths,
        "val_unseen": val.indices[new],
    }
    write_atomic(work.out / LINES, save(tensors, {READING: json.dumps(reading)}))
    return LINES, {
        "data/train_samples": float(len(train.indices)),
        "data/val_samples": float(len(val.indices)),
        "data/bad_samples": float(len(train.bad) + len(val.bad)),
        "data/squeezed_lines": float(train.squeezed + val.squeezed),
        "data/widest_px": float(max(train.widest, val.widest)),
        "data/classes": float(checked.charset.classes),
    }


def _events(work: Work) -> Callable[[str, int, int], None]:
    def report(split: str, done: int, total: int) -> None:
        work.emit({"event": "step", "phase": f"checking {split}", "step": done, "steps": total})

    return report


def _write_check(work: Work, splits: dict[str, Checked]) -> None:
    """The counts as JSON, and one line for each bad sample as CSV."""
    work.write_json("check.json", {split: check.counts for split, check in splits.items()})
    with Path(work.out / "bad_samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "name", "reason", "detail"])
        for check in splits.values():
            writer.writerows([b.split, b.name, b.reason, b.detail] for b in check.bad)


def _label_hashes(source: Source, indices: np.ndarray) -> np.ndarray:
    """64 bits of each label: little memory for millions, and enough to tell them apart."""
    hashes = (
        int.from_bytes(blake2b(source.label(int(i)).encode(), digest_size=8).digest())
        for i in indices
    )
    return np.fromiter(hashes, np.uint64, len(indices))
