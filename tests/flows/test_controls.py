"""Networks that were not slimmed, trained with the same multiply-adds."""

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from crnn.checkpoint import load_checkpoint
from crnn.metrics import wilson_interval
from crnn.networks.recogniser import Recogniser
from crnn.networks.vgg import CHANNELS
from crnn.settings import ExportSettings, ModelSettings
from flows.cache import SUMMARY, Manifest
from flows.comparison import comparisons
from flows.definitions import control_stage, export_stage
from flows.experiment import Experiment
from flows.report import table_cells
from flows.stages.controls import as_small, epochs_for, fresh, width_for
from pruning.cost import parameters
from pruning.gammas import absolute_gammas, norms_of
from pruning.selection import keep_masks
from pruning.settings import PruneSettings
from pruning.slimming import slim
from pruning.surgery import cut
from tests.conftest import give_head, random_recogniser
from tests.flows.commands import PATIENCE
from tests.flows.conftest import TINY, Project, computed, copy_of, points_of, runs_of
from tests.flows.test_pipeline import start_and_wait_for, weights
from tests.flows.test_report import row

Finished = tuple[Project, dict[str, Any]]

CONTROLS = {"scratch": True, "small": True, "ratios": [0.3]}


def with_controls(finished: Finished, folder: Path) -> Project:
    """The finished project once more, with controls at its lower ratio still to be trained."""
    project = copy_of(finished, folder)
    text = project.params.read_text(encoding="utf-8")
    project.params.write_text(f"{text}controls: {json.dumps(CONTROLS)}\n", encoding="utf-8")
    return project


@pytest.fixture(scope="session")
def controlled(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny frontier with controls, and what it printed."""
    return computed(tmp_path_factory, "controlled", partial(with_controls, finished))


@pytest.mark.parametrize(
    ("total", "control", "epochs"),
    [(600, 100, 6), (610, 10, 61), (14, 10, 1), (16, 10, 2), (3, 10, 1)],
)
def test_the_epochs_of_a_control_spend_the_total(total: int, control: int, epochs: int) -> None:
    assert epochs_for(total, control) == epochs


def parameters_of(width: float, hidden: int, classes: int) -> int:
    """Closed form for VGG13 with BatchNorm, two bidirectional LSTM layers and a head."""
    channels = [max(1, round(c * width)) for c in CHANNELS]
    convolutions = sum(
        9 * before * after + 2 * after
        for before, after in zip([3, *channels], channels, strict=False)
    )
    lstm = sum(2 * 4 * hidden * (n + hidden + 2) for n in (channels[-1], 2 * hidden))
    return convolutions + lstm + (2 * hidden + 1) * classes


@pytest.mark.parametrize("count", [1, 6_000, 12_345, 100_000, 10**9])
@pytest.mark.parametrize("width", [0.29, 1.0])
def test_the_width_found_is_the_largest_of_all_with_few_enough_parameters(
    count: int, width: float
) -> None:
    settings = ModelSettings(width=width, hidden=8)
    found = width_for(count, Recogniser(settings, 11))
    steps = [step / 10_000 for step in range(1, round(10_000 * width) + 1)]
    fitting = [step for step in steps if parameters_of(step, 8, 11) <= count]
    assert found == max(fitting, default=0.0001)
    model = Recogniser(settings.model_copy(update={"width": found}), 11)
    assert parameters(model)["total"] == parameters_of(found, 8, 11)


@pytest.mark.parametrize("head", [{}, {"head_rank": 2}, {"head_rank": 2, "head_rows": 3}])
def test_a_small_network_has_lstm_and_head_like_the_cut_one(head: dict[str, int]) -> None:
    model = random_recogniser(width=0.2)
    gammas = absolute_gammas(model)
    settings = PruneSettings.model_validate({"lstm_ratio": 0.5, **head})
    pruned = slim(model, keep_masks(gammas, 0.5, settings), settings)
    found = as_small(pruned)
    assert found.rnn.hidden_size == found.settings.hidden == pruned.rnn.hidden_size == 4
    assert [p.shape for p in found.head.parameters()] == [p.shape for p in pruned.head.parameters()]
    assert all(map(torch.equal, fresh(found, 0).head.buffers(), pruned.head.buffers()))
    count = parameters(found)["total"]
    assert 0.95 * parameters(pruned)["total"] < count <= parameters(pruned)["total"]


def test_a_small_network_is_as_small_beside_the_cut_head_of_many_classes() -> None:
    pruned = Recogniser(ModelSettings(width=0.1, hidden=8), 3000)
    give_head(pruned, 2)
    found = as_small(pruned)
    assert found.settings.width == 0.1, "nothing of the channels was cut"
    assert parameters(found) == parameters(pruned)


def test_a_network_from_scratch_has_the_weights_of_a_new_one() -> None:
    trained = random_recogniser(seed=1).float()
    torch.manual_seed(5)
    new = Recogniser(trained.settings, trained.classes).state_dict()
    for name, tensor in fresh(trained, 5).state_dict().items():
        assert torch.equal(tensor, new[name]), name


def test_a_cut_from_scratch_keeps_its_shapes_and_nothing_else() -> None:
    model = random_recogniser().float()
    masks = [torch.arange(len(g)) % 3 == 0 for g in gammas(model)]
    pruned = cut(model, masks)
    one, same, other = fresh(pruned, 0), fresh(pruned, 0), fresh(pruned, 1)
    for name, tensor in pruned.state_dict().items():
        assert one.state_dict()[name].shape == tensor.shape
        assert torch.equal(one.state_dict()[name], same.state_dict()[name])
        if tensor.ndim > 1:
            assert not (one.state_dict()[name] == tensor).any()
            assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert all((g == 0.5).all() for g in gammas(one))


def gammas(model: Recogniser) -> list[torch.Tensor]:
    return [layer.weight.detach() for layer in norms_of(model).values()]


def test_controls_are_points_of_the_frontier_with_the_compute_of_slimming(
    controlled: Finished,
) -> None:
    project, result = controlled
    uncut, slim, scratch, small, _ = result["rows"]
    points = ["baseline", "0.3", "scratch 0.3", "small 0.3", "0.6"]
    assert [row["point"] for row in result["rows"]] == points
    # In the 4 sparse epochs the baseline reads along, which is a third of training.
    spent = (2 + 4 + 4 / 3) * uncut["cost/macs"] + 1 * slim["cost/macs"]
    for control in (scratch, small):
        assert control["control/epochs"] == max(1, round(spent / control["cost/macs"])) > 6
        label = control["point"]
        key = control["stages"][control["control"]]
        assert project.manifests()[label]["key"] == key
        history = (project.home / "stages" / key / "history.jsonl").read_text().splitlines()
        assert len(history) == control["control/epochs"]
        records = [json.loads(line) for line in history]
        assert records[-1]["val/word_accuracy"] == control["val/word_accuracy"]
    for figure in ("prune/ratio_achieved", "cost/params_total", "cost/macs"):
        assert scratch[figure] == slim[figure]
    assert "prune/ratio_achieved" not in small
    assert 0.8 * slim["cost/params_total"] < small["cost/params_total"] <= slim["cost/params_total"]
    model = load_checkpoint(project.home / small["checkpoint"]).model
    assert (model.settings.hidden, model.settings.width) == (8, small["control/width"])


def test_controls_are_reported_recorded_kept_and_cached(controlled: Finished) -> None:
    project, result = controlled
    sentences = comparisons(result["rows"])
    assert len(sentences) == 1
    assert sentences[0] in (Path(result["report"]) / "frontier.md").read_text()
    page = (Path(result["report"]) / "report.html").read_text(encoding="utf-8")
    details = json.loads(page.split('type="application/json">')[1].split("</script>")[0])["details"]
    for point in ("scratch 0.3", "small 0.3"):
        folder = project.home / "stages" / project.manifests()[point]["key"]
        assert details[f"layers of {point}"] == (folder / SUMMARY).read_text(encoding="utf-8")
    again = project.run("frontier", str(project.params)).stdout
    assert "everything was cached" in again
    assert sentences[0] in again
    points = points_of(project, result["sweep_run"])
    assert set(points) == {"baseline", "0.3", "scratch 0.3", "small 0.3", "0.6"}
    recorded = points["small 0.3"].data
    assert recorded.metrics["control/epochs"] == result["rows"][3]["control/epochs"]
    assert recorded.tags["small_run"] == runs_of(project, "stage")["small 0.3"].info.run_id
    assert "\n0 folders" in "\n" + project.run("gc", "--older-than", "0").stdout


def test_controls_add_their_own_stages_and_a_killed_one_goes_on_to_the_same_bits(
    finished: Finished, controlled: Finished, tmp_path: Path
) -> None:
    project = with_controls(finished, tmp_path / "copy")
    process = start_and_wait_for(project, "scratch 0.3: epoch 3/")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    run = project.run("frontier", str(project.params), "--json")
    assert "scratch 0.3: goes on after epoch" in run.stderr
    labels = {"scratch 0.3", "small 0.3", "measure scratch 0.3", "measure small 0.3", "latency"}
    done = set(json.loads(run.stdout)["computed"])
    assert {"scratch 0.3", "measure scratch 0.3", "measure small 0.3"} <= done <= labels
    assert set(controlled[1]["computed"]) == labels
    for label in ("scratch 0.3", "small 0.3"):
        assert weights(project, label) == weights(controlled[0], label), label


def row_of(point: str, right: int, lines: int) -> dict[str, Any]:
    low, high = wilson_interval(right / lines, lines)
    ends = {"val/word_accuracy_low": low, "val/word_accuracy_high": high}
    return {**row(point, right / lines, 10), **ends}


def test_the_comparison_says_who_is_ahead_and_whether_it_may_be_chance() -> None:
    # 56 of 70 against 48 of 80 are 0.0524 to 0.3339 apart (Newcombe 1998, table II, a).
    rows = [
        row("baseline", 0.9, 10),
        row_of("0.62", 56, 70),
        row_of("scratch 0.62", 48, 80),
        row_of("small 0.62", 68, 80),
        row("0.7", 0.5, 5),
        row("small 0.7", 0.5, 5),
        row("0.8", 0.5, 5),
    ]
    first, second = comparisons(rows)
    assert first == (
        "0.62: slimmed 80.0% (69.2-87.7); the same architecture from scratch 60.0% (49.0-70.0):"
        " slimming is ahead by 20.0 points (5.2 to 33.4); an uncut network as small"
        " 85.0% (75.6-91.2): slimming is behind by 5.0 points (-7.2 to 17.5), which may be chance."
    )
    assert second.endswith("slimming is level with it (-2.2 to 2.2).")
    # Where it is known which lines each read wrongly, these decide.
    rows[1] |= {"ahead/small": -0.05, "ahead/small_low": -0.08, "ahead/small_high": -0.02}
    assert comparisons(rows)[0].endswith("slimming is behind by 5.0 points (2.0 to 8.0).")


def test_what_has_no_prune_ratio_is_shown_without_one() -> None:
    small = {k: v for k, v in row("small 0.6", 0.9, 10).items() if k != "prune/ratio_achieved"}
    header, (cells,) = table_cells([small])
    assert dict(zip(header, cells, strict=True))["cut"] == "-"


PRUNED = Manifest(
    key="prune-1",
    stage="prune",
    label="prune 0.3",
    result="model",
    files={"model": {"sha256": "0"}},
    metrics={},
    settings={"basis_points": 3000},
    inputs={},
    run_id=None,
    seconds=0,
)


@pytest.mark.parametrize(("kind", "ratio"), [("scratch", 0.3), ("small", None)])
def test_the_file_of_a_network_that_was_not_cut_names_no_ratio(
    kind: str, ratio: float | None
) -> None:
    stages = dict.fromkeys(("data", "baseline", "sparse", "prune", kind), PRUNED)
    assert export_stage(ExportSettings(), stages).settings["of"].get("ratio") == ratio


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({}, {"uncut_epochs": 6, "taught_epochs": 4, "cut_epochs": 1}),
        ({"sparse": {"epochs": 4, "distill": 0}}, {"uncut_epochs": 6, "taught_epochs": 0}),
        ({"finetune": {"epochs": 3, "distill": 1}}, {"taught_epochs": 7, "cut_epochs": 3}),
        (
            {"sparse": {"epochs": 4, "from_baseline": False}},
            {"uncut_epochs": 0, "fresh_epochs": 4},
        ),
        (
            {
                "sparse": {"epochs": 4, "from_baseline": False},
                "finetune": {"epochs": 1, "distill": 1},
            },
            {"uncut_epochs": 2, "fresh_epochs": 4, "taught_epochs": 1},
        ),
        (
            {
                "sparse": {"epochs": 4, "from_baseline": False},
                "finetune": {"epochs": 0, "distill": 1},
            },
            {"uncut_epochs": 0, "fresh_epochs": 4, "taught_epochs": 0},
        ),
        (
            {"teacher": {"epochs": 5}, "baseline": {"epochs": 2, "distill": 1}},
            {"uncut_epochs": 6, "taught_epochs": 6, "teacher_epochs": 5},
        ),
    ],
)
def test_a_control_counts_all_that_was_trained_and_who_read_along(
    changes: dict[str, Any], epochs: dict[str, int]
) -> None:
    experiment = Experiment.model_validate({**TINY, **changes})
    upstream = dict.fromkeys(("data", "baseline", "prune", "teacher"), PRUNED)
    stage = control_stage(experiment, "scratch", upstream, 0)
    assert {name: stage.settings[name] for name in epochs} == epochs
    assert "distill" not in stage.settings["train"]
