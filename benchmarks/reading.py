"""Ways to read the val lines side by side: decodings, and a ready-made recogniser if there is one.

    .venv/bin/python -m benchmarks.reading params/sroie.yaml MODEL.onnx [MODEL.onnx ...]

Takes section.key=value as well, for what shall differ from the params file. Every candidate reads
every line, one at a time on one thread, each in turn; opening and decoding its file is not timed.
Beam search is tried with the first model; its language is the labels of train. Where `pip install
rapidocr-onnxruntime` has been done (another environment will do), its PP-OCRv4 recogniser reads
along. It was not trained on such lines, takes lines of 48 px, and often leaves out spaces: the
table has the accuracy without spaces as well.
"""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.cuts import lines_of
from crnn.beam import BeamSearch, NGram
from crnn.metrics import wilson_interval
from crnn.reading import load_exported, read_images
from flows.experiment import load_experiment

Read = Callable[[Image.Image], str]


def main() -> None:
    """Read, and print a table."""
    params, *given = sys.argv[1:]
    models = [word for word in given if "=" not in word]
    changed = [word for word in given if "=" in word]
    train, val = lines_of(load_experiment(Path(params), changed))
    candidates: dict[str, tuple[Read, int]] = {}
    for model in models:
        candidates[model] = (_greedy(model), Path(model).stat().st_size)
    exported, size = load_exported(Path(models[0]), 1), Path(models[0]).stat().st_size
    language = NGram(map(train.source.label, train.indices.tolist()), exported.charset)
    for name, beam in (("beam", BeamSearch()), ("beam, n-gram", BeamSearch(language=language))):
        candidates[f"{models[0]}, {name}"] = (_searching(exported, beam), size)
    if find_spec("rapidocr_onnxruntime"):
        candidates["rapidocr, PP-OCRv4 mobile"] = _rapidocr()
    else:
        print("rapidocr-onnxruntime is not installed and does not read along", file=sys.stderr)
    texts: dict[str, list[str]] = {name: [] for name in candidates}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    indices = val.indices.tolist()
    labels = [val.source.label(index) for index in indices]
    for index in indices:
        image = val.source.image(index)
        for name, (read, _) in candidates.items():
            begun = time.perf_counter()
            texts[name].append(read(image))
            times[name].append(1000 * (time.perf_counter() - begun))
    print(f"{len(labels)} lines, one thread\n\n| | accuracy (95%) | without spaces | MB | ms |")
    print("| :-- | --: | --: | --: | --: |")
    for name, (_, size) in candidates.items():
        share = _share(texts[name], labels)
        low, high = wilson_interval(share, len(labels))
        bare = _share([_bare(t) for t in texts[name]], [_bare(label) for label in labels])
        figures = f"{100 * share:.1f}% ({100 * low:.1f}-{100 * high:.1f}) | {100 * bare:.1f}%"
        print(f"| {name} | {figures} | {size / 1e6:.2f} | {median(times[name]):.2f} |")


def _share(texts: list[str], labels: list[str]) -> float:
    return float(np.mean([text == label for text, label in zip(texts, labels, strict=True)]))


def _bare(text: str) -> str:
    return text.replace(" ", "")


def _greedy(model: str) -> Read:
    exported = load_exported(Path(model), 1)
    return lambda image: read_images(exported, [image])[0].text


def _searching(exported: Any, beam: BeamSearch) -> Read:
    return lambda image: read_images(exported, [image], beam)[0].text


def _rapidocr() -> tuple[Read, int]:
    """The recogniser alone, without finding lines and turning them."""
    import rapidocr_onnxruntime
    import yaml
    from rapidocr_onnxruntime.ch_ppocr_rec import TextRecognizer

    folder = Path(rapidocr_onnxruntime.__file__).parent
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    config = {**settings["Global"], **settings["Rec"], "intra_op_num_threads": 1}
    path = folder / config["model_path"]
    recogniser = TextRecognizer({**config, "model_path": str(path)})
    # It takes blue, green, red.
    read: Read = lambda image: recogniser(np.asarray(image.convert("RGB"))[..., ::-1])[0][0][0]  # noqa: E731
    return read, path.stat().st_size


if __name__ == "__main__":
    main()
