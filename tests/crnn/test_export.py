"""Exported networks against the one they were made of, and files that are none."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from crnn.charset import Charset
from crnn.checkpoint import Checkpoint, reader_of
from crnn.data.batches import normalise
from crnn.data.render import render_line
from crnn.errors import CheckpointError
from crnn.export import Shipped, export_onnx, export_program
from crnn.reading import DIGEST, METADATA, load_exported, read_images
from crnn.settings import ExportSettings
from pruning.head import cut_head, frames_of
from tests.conftest import DIGITS, give_head, random_recogniser

CHECKPOINT = Checkpoint(random_recogniser().float().eval(), Charset("0123456789"), 160, "finetune")


def pictures(count: int = 5) -> list[Image.Image]:
    return [render_line(1, number, DIGITS)[0] for number in range(count)]


@pytest.mark.parametrize("output", ["probabilities", "classes"])
@pytest.mark.parametrize("normalise", [True, False])
def test_an_export_reads_as_the_network_at_any_width_and_batch(
    tmp_path: Path, output: str, normalise: bool
) -> None:
    settings = ExportSettings.model_validate({"normalise": normalise, "output": output})
    export_onnx(tmp_path / "model.onnx", CHECKPOINT, settings, {"ratio": 0.62})
    exported = load_exported(tmp_path / "model.onnx")
    reader = reader_of(CHECKPOINT)
    for shape in ((1, 32, 48, 3), (3, 32, 160, 3)):
        pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
        for found, truth in zip(exported.best_path(pixels), reader.best_path(pixels), strict=True):
            assert np.abs(found - truth).max() < 1e-5
    readings, truths = read_images(exported, pictures()), read_images(reader, pictures())
    assert [r.text for r in readings] == [r.text for r in truths]
    assert np.allclose(*([r.confidence for r in found] for found in (readings, truths)), rtol=1e-3)
    assert (exported.max_width, exported.stride) == (160, 4)
    assert exported.provenance == {"ratio": 0.62}


@pytest.mark.parametrize(("rank", "rows"), [(None, 0), (5, 0), (5, 20)])
def test_the_best_of_many_classes_is_found(tmp_path: Path, rank: int | None, rows: int) -> None:
    characters = "".join(chr(0x4E00 + number) for number in range(100))
    model = random_recogniser(classes=101).float().eval()
    torch.nn.init.normal_(model.head.weight)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 160, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():  # What all frames share decides nothing.
        frames = model.rnn(model.features(normalise(images)))[0].mean((0, 1))
        model.head.bias.copy_(-model.head.weight @ frames)
    if rank:
        model = cut_head(model, rank, rows, frames_of(model, [normalise(images)]))
    best = Checkpoint(model, Charset(characters), 160, "finetune")
    settings = ExportSettings(output="classes")
    export_onnx(tmp_path / "model.onnx", best, settings, {})
    with torch.no_grad():
        classes, confidences = Shipped(model, settings)(torch.from_numpy(pixels))
    assert len(classes.unique()) >= 3
    found = load_exported(tmp_path / "model.onnx").best_path(pixels)
    assert np.array_equal(found[1], classes)
    assert np.abs(found[0] - confidences.numpy()).max() < 1e-5


@pytest.mark.parametrize("backbone", ["vgg13", "repvgg_a0", "mobilenetv3_small_100"])
@pytest.mark.parametrize("settings", [{}, {"normalise": False, "output": "classes"}])
def test_a_program_of_torch_computes_the_same_at_any_width_and_batch(
    tmp_path: Path, backbone: str, settings: dict[str, Any]
) -> None:
    chosen = ExportSettings.model_validate(settings)
    width = 0.05 if backbone == "vgg13" else 1.0
    model = random_recogniser(width=width, backbone=backbone).float().eval()
    checkpoint = Checkpoint(model, Charset("0123456789"), 160, "finetune")
    export_program(tmp_path / "model.pt2", checkpoint, chosen, {"ratio": 0.62})
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        metadata = json.loads(archive.read(names["crnn-slim.json"]))
    assert metadata["provenance"] == {"ratio": 0.62}
    assert metadata["charset"] == "0123456789"
    program = torch.export.load(tmp_path / "model.pt2").module(check_guards=False)
    shipped = Shipped(model, chosen).eval()
    for lines, pixels in ((1, 48), (3, 160)):
        shape = (lines, 32, pixels, 3) if chosen.normalise else (lines, 3, 32, pixels)
        given = torch.randint(0, 255, shape, dtype=torch.uint8)
        given = given if chosen.normalise else normalise(given)
        with torch.no_grad():
            torch.testing.assert_close(program(given), shipped(given), rtol=0, atol=1e-4)


def test_a_program_of_torch_has_a_head_with_rows(tmp_path: Path) -> None:
    model = random_recogniser().float().eval()
    give_head(model, 3, 2)
    checkpoint = Checkpoint(model, Charset("0123456789"), 160, "finetune")
    export_program(tmp_path / "model.pt2", checkpoint, ExportSettings(), {})
    program = torch.export.load(tmp_path / "model.pt2").module(check_guards=False)
    given = torch.randint(0, 255, (3, 32, 160, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = Shipped(model, ExportSettings())(given)
        torch.testing.assert_close(program(given), expected, rtol=0, atol=1e-4)


def test_a_deployed_network_of_timm_is_exported(tmp_path: Path) -> None:
    model = random_recogniser(width=1.0, backbone="repvgg_a0").float().eval()
    checkpoint = Checkpoint(model, Charset("0123456789"), 160, "finetune")
    export_onnx(tmp_path / "model.onnx", checkpoint, ExportSettings(), {})
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 22, "one for each block"
    pixels = np.full((1, 32, 64, 3), 40, np.uint8)
    found = load_exported(tmp_path / "model.onnx").best_path(pixels)[0]
    assert np.abs(found - reader_of(checkpoint).best_path(pixels)[0]).max() < 1e-4


def test_the_file_is_a_function_of_its_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_onnx(tmp_path / name, CHECKPOINT, ExportSettings(), {})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(CheckpointError, match="no model file at"):
        load_exported(path)
    path.write_bytes(b"no network")
    with pytest.raises(CheckpointError, match="no ONNX network"):
        load_exported(path)
    export_onnx(path, CHECKPOINT, ExportSettings(), {})
    network = onnx.load(path)
    entries = {entry.key: entry for entry in network.metadata_props}
    altered = json.loads(entries[METADATA].value)
    altered["charset"] = "9876543210"
    entries[METADATA].value = json.dumps(altered)
    onnx.save(network, path)
    with pytest.raises(CheckpointError, match="missing or has been altered"):
        load_exported(path)
    entries[METADATA].value = json.dumps({"format": "crnn-slim-onnx/9"})
    entries[DIGEST].value = hashlib.sha256(entries[METADATA].value.encode()).hexdigest()
    onnx.save(network, path)
    with pytest.raises(CheckpointError, match=r"format 'crnn-slim-onnx/9'.*export it again"):
        load_exported(path)
    del network.metadata_props[:]
    onnx.save(network, path)
    with pytest.raises(CheckpointError, match="missing or has been altered"):
        load_exported(path)


@pytest.mark.parametrize(
    ("script", "allowed"),
    [
        (
            "from crnn.reading import load_exported, read_images\n"
            "read = read_images(load_exported(model), [Image.open(image)])[0].text",
            {"crnn", "numpy", "onnxruntime", "PIL"},
        ),
        (
            "from flows.predict import predict\nread = predict(str(model), [image])[0][0]['text']",
            {"crnn", "flows", "numpy", "onnxruntime", "PIL", "rapidfuzz"},
        ),
    ],
)
def test_reading_with_an_export_needs_few_packages(
    tmp_path: Path, script: str, allowed: set[str]
) -> None:
    export_onnx(tmp_path / "model.onnx", CHECKPOINT, ExportSettings(), {})
    pictures(1)[0].save(tmp_path / "line.png")
    around = (
        "import sys; from pathlib import Path; from PIL import Image\n"
        "import onnxruntime, numpy\n"  # What these bring with them is theirs.
        "before = set(sys.modules)\n"
        "model, image = map(Path, sys.argv[1:])\n"
        f"{script}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(read); print(*sorted(new - sys.stdlib_module_names))"
    )
    command = [sys.executable, "-c", around, tmp_path / "model.onnx", tmp_path / "line.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text, new = done.stdout.splitlines()
    assert text == read_images(reader_of(CHECKPOINT), pictures(1))[0].text
    assert set(new.split()) <= allowed
