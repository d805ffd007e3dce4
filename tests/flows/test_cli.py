"""The command line as a user meets it: what it prints, and its exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from crnn.checkpoint import load_checkpoint
from flows.cli import _print_table
from flows.servers import free_port
from pruning.gammas import absolute_gammas
from tests.flows.conftest import Project, copy_of, new_project, runs_of, wait_for
from tests.flows.test_servers import reachable_from_outside

Finished = tuple[Project, dict[str, Any]]


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on standard error."""
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("crnn-slim: ")
    return last


def test_help_waits_for_no_large_library() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "flows.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "frontier" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "mlflow", "prefect", "numpy", "pydantic", "onnxruntime", "PIL"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "0.62;0.7"], "--ratios takes numbers with commas"),
        (["--ratios", "1.0"], "less than 1, not 1.0"),
        (["--set", "baselin.epochs=1"], "did you mean 'baseline'"),
        (["--set", "data.train=0"], "data.train: input should be greater than or equal to 1"),
        (["--set", "execution.parallel=0"], "execution.parallel: input should be greater than"),
        (["--set", "execution.nodes=2"], "nodes, more than one, and rendezvous"),
        (["--set", "execution.rendezvous=a..b:99999"], "rendezvous is host:port, such as"),
        (["--set", "data.text.min_length=9"], "min_length is at most max_length"),
        (
            [
                *("--set", "data.root=/nowhere", "--set", "data.train=a.txt"),
                *("--set", "data.charset=charset.txt"),
            ],
            "data.root /nowhere is no",
        ),
    ],
)
def test_each_mistake_is_one_sentence_and_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    project = new_project(tmp_path)
    result = project.run("frontier", str(project.params), *arguments, code=2)
    assert message in only_line(result)


def test_a_ratio_beyond_the_floors_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    project = new_project(tmp_path, prune={"min_ratio": 0.5})
    result = project.run("frontier", str(project.params), code=2)
    assert "prune ratio 0.6 would remove 176 of 294 channels" in only_line(result)
    assert set(project.manifests()) == {"data"}


@pytest.mark.parametrize("wish", ["params: 10", "macs: 10", "size_mb: 0.001", "latency_ms: 1e-6"])
def test_a_target_out_of_reach_is_refused_before_anything_is_trained(
    tmp_path: Path, wish: str
) -> None:
    project = new_project(tmp_path)
    wished = ("--set", f"prune.targets={{{wish}}}")
    result = project.run("frontier", str(project.params), *wished, code=2)
    kind = wish.partition(":")[0]
    assert f"prune.targets.{kind} " in only_line(result)
    assert "is out of reach; the nearest is" in only_line(result)
    assert set(project.manifests()) == {"data"}


def test_a_sparsity_that_will_not_be_reached_is_said_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    project = new_project(tmp_path, prune={"targets": {"params": 10}})
    run = partial(project.run, "frontier", str(project.params), code=2)
    said = run("--set", "sparse.target_ratio=0.95").stderr
    assert "baseline: sparse.target_ratio 0.95 will not be reached, 0.9217 at most" in said
    assert "will not be reached" not in run("--set", "sparse.target_ratio=0.9").stderr
    said = run("--set", "sparse.drop_branches=true").stderr
    assert "baseline: sparse.drop_branches does nothing: vgg13 has none to drop" in said
    assert set(project.manifests()) == {"data"}


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    project = new_project(tmp_path)
    wrong = ("frontier", str(project.params), "--set", "seed=-1")
    assert "Traceback" in project.run(*wrong, "--debug", code=2).stderr
    assert "Traceback" not in project.run(*wrong, code=2).stderr


@pytest.fixture
def labelled(label_folder: Path, tmp_path: Path) -> Project:
    """The tiny experiment on a label file."""
    data = {
        "root": str(label_folder),
        "train": "train.txt",
        "val": "val.txt",
        "charset": "charset.txt",
        "max_width": 160,
    }
    return new_project(tmp_path / "labelled", data=data)


def test_check_data_lists_what_cannot_be_used(labelled: Project, label_folder: Path) -> None:
    clean = labelled.run("check-data", str(labelled.params))
    train, val = clean.stdout.splitlines()
    rest = r", 0 wider than data\.max_width and squeezed; the widest has \d+ px at 32 px high"
    assert re.fullmatch("train: 24 samples, 24 usable" + rest, train)
    assert re.fullmatch("val: 8 samples, 8 usable" + rest, val)
    with (label_folder / "train.txt").open("a", encoding="utf-8") as file:
        file.write("images/0.png\t12é\n")
    Image.new("RGB", (1, 32)).save(label_folder / "images" / "thin.png")
    with (label_folder / "val.txt").open("a", encoding="utf-8") as file:
        file.write("images/thin.png\t1\n")
    result = labelled.run("check-data", str(labelled.params), "--json", code=2)
    found = json.loads(result.stdout)
    counts = found["counts"]["train"]
    assert [counts[name] for name in ("total", "usable", "bad", "squeezed")] == [25, 24, 1, 0]
    assert [bad["reason"] for bad in found["bad"]] == [
        "characters outside the charset",
        "label too long for CTC",
    ]


def test_bad_samples_are_refused_or_skipped_and_listed(
    labelled: Project, label_folder: Path
) -> None:
    with (label_folder / "train.txt").open("a", encoding="utf-8") as file:
        file.write("images/gone.png\t1\n")
    refused = labelled.run("frontier", str(labelled.params), code=2)
    assert "1 of 33 samples cannot be used (1 unreadable)" in refused.stderr
    assert "train images/gone.png: unreadable (cannot read image file" in refused.stderr
    Image.new("RGB", (900, 32)).save(label_folder / "images" / "wide.png")
    with (label_folder / "val.txt").open("a", encoding="utf-8") as file:
        file.write("images/wide.png\t1\n")
    skip = ("--json", "--set", "data.on_bad_sample=skip", "--ratios", "0.3")
    check = ("check-data", str(labelled.params))
    found = labelled.run(*check, code=2).stdout
    assert "train images/gone.png: unreadable" in found
    assert labelled.run(*check, "--set", "data.on_bad_sample=skip").stdout == found
    skipped = labelled.run("frontier", str(labelled.params), *skip)
    assert json.loads(skipped.stdout)["rows"][0]["val/samples"] == 9
    manifest = labelled.manifests()["data"]
    listed = labelled.home / "stages" / manifest["key"] / "bad_samples.csv"
    assert "train,images/gone.png,unreadable,cannot read image file" in listed.read_text()
    assert f"data: samples left out: 1, listed in {listed}" in skipped.stderr
    squeezed = "data: lines squeezed to data.max_width: 1, the widest from 900 px"
    assert squeezed in skipped.stderr
    assert manifest["metrics"]["data/bad_samples"] == 1
    assert manifest["metrics"]["data/squeezed_lines"] == 1
    assert manifest["metrics"]["data/widest_px"] == 900


def test_an_empty_data_set_is_refused(labelled: Project, label_folder: Path) -> None:
    (label_folder / "val.txt").write_text("")
    result = labelled.run("frontier", str(labelled.params), code=2)
    assert "the val split has no usable sample" in only_line(result)
    (label_folder / "val.txt").write_text("images/0.png\té\n", encoding="utf-8")
    skip = (str(labelled.params), "--set", "data.on_bad_sample=skip")
    assert "val: 1 samples, 0 usable" in labelled.run("check-data", *skip, code=2).stdout
    assert "the val split has no usable sample" in only_line(
        labelled.run("frontier", *skip, code=2)
    )


def test_a_table_loses_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    header = ["point", *(f"column-{n}" for n in range(50))]
    _print_table("title", header, [header])
    shown = capsys.readouterr().out
    assert all(shown.count(f"{name} ") >= 2 for name in header[1:10])
    assert shown.count("column-49") == 2
    assert "…" not in shown


def test_preview_shows_the_cuts_the_pipeline_makes(finished: Finished) -> None:
    project, result = finished
    seen = json.loads(project.run("preview", str(project.params), "--json").stdout)
    cuts = seen["cuts"]
    assert seen["readiness"]["free_ratio"] >= 0.6, "the target of the sparse stage"
    assert [cut["live_removed"] for cut in cuts] == [0, 0]
    for cut, row in zip(cuts, result["rows"][1:], strict=True):
        assert cut["params"] == row["cost/params_total"]
        assert cut["macs"] == row["cost/macs"]
        assert cut["bytes"] == row["cost/bytes"]
        assert len(cut["widths"]) == 10
    table = project.run("preview", str(project.params), "--ratios", "0.5,0.9").stdout
    assert table.startswith("a cut of up to 0.6")
    first_layer = next(line for line in table.splitlines() if " cnn.1 " in line)
    assert first_layer.count("█") >= 2, "half the channels of a layer are two blocks of four"


def test_a_ratio_beyond_the_floors_is_said_before_others_are_trained(
    finished: Finished, tmp_path: Path
) -> None:
    project = copy_of(finished, tmp_path / "copy")
    before = set(project.home.glob("stages/finetune-*"))
    floors = ("--set", "prune.min_ratio=0.5", "--ratios", "0.35,0.6")
    refused = project.run("frontier", str(project.params), *floors, code=2)
    assert "ratio 0.6" in refused.stderr
    assert set(project.home.glob("stages/finetune-*")) == before


def test_preview_needs_a_sparse_stage_and_a_ratio_within_the_floors(
    finished: Finished, tmp_path: Path
) -> None:
    fresh = new_project(tmp_path)
    result = fresh.run("preview", str(fresh.params), code=2)
    assert "is not in the cache; compute it with" in only_line(result)
    project = finished[0]
    high = project.run("preview", str(project.params), "--ratios", "0.99", code=2)
    assert "the largest ratio is 0.96" in only_line(high)


@pytest.fixture
def pictures(label_folder: Path) -> Path:
    (label_folder / "images" / "broken.png").write_text("no image")
    return label_folder / "images"


def test_predict_reads_files_and_folders(finished: Finished, pictures: Path) -> None:
    project, result = finished
    key = result["rows"][1]["stages"]["finetune"]
    model = str(project.home / "stages" / key / "model.safetensors")
    one = project.run("predict", model, str(pictures / "3.png"))
    path, text, confidence = one.stdout.rstrip("\n").split("\t")
    assert path.endswith("3.png")
    assert set(text) <= set("0123456789")
    assert 0 <= float(confidence) <= 1
    every = project.run("predict", model, str(pictures), "--json", code=2)
    found = json.loads(every.stdout)
    assert len(found["readings"]) == 32
    assert found["failures"] == [
        {"image": str(pictures / "broken.png"), "reason": "not a readable image"}
    ]
    assert "not read:" in every.stderr


def test_predict_searches_as_it_is_told_to(
    finished: Finished, pictures: Path, tmp_path: Path
) -> None:
    project, result = finished
    model = str(project.home / result["rows"][0]["checkpoint"])
    (pictures / "broken.png").unlink()
    files = {name: tmp_path / name for name in ("words", "sevens", "ones")}
    for name, content in (("words", "7\n1\nx1\n"), ("sevens", "777\n" * 9), ("ones", "111\n" * 9)):
        files[name].write_text(content)

    def texts(*arguments: object) -> list[str]:
        run = project.run("predict", model, str(pictures), "--json", *map(str, arguments))
        assert ("1 of 3 texts in" in run.stderr) == ("--lexicon" in arguments)
        return [reading["text"] for reading in json.loads(run.stdout)["readings"]]

    words = ("--lexicon", files["words"])
    assert set(texts(*words)) <= {"7", "1"}
    for name, digit in (("sevens", "7"), ("ones", "1")):
        read = texts("--beam", 4, *words, "--language", files[name])
        assert set(read) == {digit}


def test_predict_goes_on_behind_a_file_name_that_is_not_utf_8(
    finished: Finished, pictures: Path, tmp_path: Path
) -> None:
    project, result = finished
    folder = tmp_path / "old"
    folder.mkdir()
    for name in (b"1\xe9.png", b"2.png"):
        shutil.copy(pictures / "3.png", os.fsencode(folder) + b"/" + name)
    strict = Project(project.folder, {"PYTHONIOENCODING": "utf-8:strict"})
    model = str(project.home / result["rows"][1]["checkpoint"])
    lines = strict.run("predict", model, str(folder)).stdout.splitlines()
    assert [Path(line.split("\t")[0]).name for line in lines] == ["1\\udce9.png", "2.png"]


def test_predict_reads_with_a_model_out_of_mlflow(finished: Finished, pictures: Path) -> None:
    project = finished[0]
    run = runs_of(project, "stage")["finetune 0.3"].info.run_id
    uri = f"runs:/{run}/model.safetensors"
    result = project.run("predict", uri, str(pictures / "0.png"), "--json")
    assert len(json.loads(result.stdout)["readings"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.safetensors", "a.png"], "no checkpoint file at gone.safetensors"),
        (["{params}", "a.png"], "is no safetensors file"),
        (["{model}", "gone.png"], "no image at gone.png"),
        (["runs:/0/model.safetensors", "a.png"], "MLflow gives no artifact at runs:/0/model"),
        (["{model}", "{empty}"], "has no image files"),
        (["{model}", "a.png", "--lexicon", "gone"], "cannot read gone: No such file"),
        (["{model}", "a.png", "--lexicon", "{params}"], "is in the charset of the model"),
    ],
)
def test_predict_refuses_what_it_cannot_read(
    finished: Finished, tmp_path: Path, arguments: list[str], message: str
) -> None:
    project, result = finished
    key = result["rows"][0]["stages"]["baseline"]
    (tmp_path / "empty").mkdir()
    places = {
        "params": project.params,
        "model": project.home / "stages" / key / "model.safetensors",
        "empty": tmp_path / "empty",
    }
    filled = [argument.format(**places) for argument in arguments]
    assert message in only_line(project.run("predict", *filled, code=2))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("gc",), "MLflow cannot be reached ((sqlite3.DatabaseError) file is not a database"),
        (("predict", "models:/a@champion", "a.png"), "MLflow gives no artifact at models:/a@"),
    ],
)
def test_a_damaged_store_of_mlflow_is_one_sentence(
    tmp_path: Path, command: tuple[str, ...], message: str
) -> None:
    project = new_project(tmp_path)
    project.database.write_bytes(b"no database " * 1000)
    assert message in only_line(project.run(*command, code=2))


def test_settings_without_effect_are_said_before_anything_is_trained(
    finished: Finished, tmp_path: Path
) -> None:
    project = new_project(tmp_path, prune={"targets": {"params": 10}})
    own = finished[0].home / finished[1]["rows"][0]["checkpoint"]
    said = project.run(
        "frontier",
        str(project.params),
        *("--set", "sparse={epochs: 1, method: proximal, strength: 0.1, target_ratio: 0.5}"),
        *("--set", f"baseline={{epochs: 0, checkpoint: {own}}}"),
        *("--set", "controls.scratch=true"),
        code=2,
    ).stderr
    assert "sparse.target_ratio 0.5 is not used: of proximal the strength decides" in said
    assert f"the controls get less than slimming had: what went into {own} before is not" in said
    idle = ["compensate=false", "calibration_lines=9", "lstm_ratio=0.1"]
    overrides = [f"prune.{setting}" for setting in idle]
    overrides += ["champion.rule=most_accurate", "champion.within=2"]
    flags = [word for override in overrides for word in ("--set", override)]
    said = project.run("frontier", str(project.params), *flags, code=2).stderr
    assert "prune.calibration_lines is not used: prune.compensate is false" in said
    assert "prune.lstm_ratio 0.1 cuts nothing: the LSTM has 8 hidden units" in said
    assert "champion.within is not used: the most_accurate may lose anything" in said


def test_convert_sroie_cuts_lines_that_check_data_accepts(tmp_path: Path) -> None:
    receipts = tmp_path / "SROIE"
    for part in ("img", "box", "key"):
        (receipts / part).mkdir(parents=True)
    for number in range(16):
        page = Image.new("L", (400, 200), 250)
        page.paste(30, (20, 20, 120, 40))
        page.save(receipts / "img" / f"{number:03d}.jpg")
        (receipts / "box" / f"{number:03d}.csv").write_text(
            "20,20,120,20,120,40,20,40,TOTAL, RM\n20,60,25,60,25,80,20,80,TOO NARROW\n"
        )
        (receipts / "key" / f"{number:03d}.json").write_text(
            json.dumps({"company": f"SHOP {number // 2}"})
        )
    target = tmp_path / "lines"
    project = new_project(
        tmp_path / "p",
        data={"root": str(target), "train": "train.txt", "val": "train.txt", "max_width": 320},
    )
    output = project.run("convert-sroie", str(receipts), str(target)).stdout
    assert "left out: too narrow for CTC: 16" in output
    found = [(target / f"{split}.txt").read_text() for split in ("train", "val")]
    assert [lines.count("\tTOTAL, RM\n") for lines in found] == [12, 4]
    receipts_of = [set(re.findall(r"images/(\d+)/", lines)) for lines in found]
    shops_of = [{int(name) // 2 for name in names} for names in receipts_of]
    assert not shops_of[0] & shops_of[1], "no shop is in both"
    with Image.open(target / "images" / "000" / "000.jpg") as crop:
        assert crop.size == (160, 32)
    assert project.run("check-data", str(project.params)).returncode == 0
    (receipts / "box" / "011.csv").write_text("1,2,30,2,30,20,1,20\n")
    short = project.run("convert-sroie", str(receipts), str(target), code=2)
    assert "not eight numbers and a text" in only_line(short)
    missing = project.run("convert-sroie", str(tmp_path), str(target), code=2)
    assert "must hold img/ and box/" in only_line(missing)


def test_ui_serves_the_project_s_runs_on_this_machine_alone(
    finished: Finished,
) -> None:
    project, unused_port = finished[0], free_port()
    command = project.command("ui", "--port", str(unused_port))
    with subprocess.Popen(command, stdout=subprocess.PIPE, **project.options()) as server:
        assert server.stdout
        assert f"http://127.0.0.1:{unused_port}" in server.stdout.readline()
        try:
            page = wait_for(f"http://127.0.0.1:{unused_port}/")
            assert b"MLflow" in page
            client = MlflowClient(f"http://127.0.0.1:{unused_port}")
            assert client.get_experiment_by_name("tiny") is not None
            assert not reachable_from_outside(unused_port)
            taken = project.run("ui", "--port", str(unused_port), code=2)
            assert f"port {unused_port} is taken" in only_line(taken)
        finally:
            server.terminate()


def test_a_charset_that_lacks_characters_is_refused_with_the_counts(
    labelled: Project, label_folder: Path
) -> None:
    (label_folder / "charset.txt").write_text("01234")
    result = labelled.run("frontier", str(labelled.params), code=2)
    assert "characters outside the charset" in result.stderr
    assert "cannot be used" in result.stderr


def test_the_article_s_settings_run_with_a_generated_charset(
    label_folder: Path, tmp_path: Path
) -> None:
    """5,962 characters and the full width; only the schedule is shortened.

    Six steps for each stage: after a single one of Adam's most gammas are the same number, and the
    reference rule cuts all that are equal to its threshold.
    """
    params = Path(__file__).parents[2] / "params" / "article.yaml"
    characters = "0123456789" + "".join(chr(0x4E00 + i) for i in range(5952))
    (label_folder / "charset.txt").write_text(characters, encoding="utf-8")
    tree = yaml.safe_load(params.read_text(encoding="utf-8"))
    tree["data"]["root"] = str(label_folder)
    for section in ("baseline", "sparse", "finetune"):
        tree[section] |= {"epochs": 1, "batch_size": 4}
    project = new_project(tmp_path / "article", **tree)
    rows = project.frontier("--ratios", "0.62")["rows"]
    assert rows[0]["cost/params_total"] == 10_258_219
    assert rows[0]["cost/params_head"] == rows[1]["cost/params_head"] == 578_411
    sparse = project.home / "stages" / project.manifests()["sparse"]["key"] / "model.safetensors"
    gammas = torch.cat(absolute_gammas(load_checkpoint(sparse).model))
    # One more than 1,825 goes, and what is equal to the threshold.
    assert rows[1]["prune/channels_kept"] == int((gammas > gammas.sort().values[1825]).sum())
