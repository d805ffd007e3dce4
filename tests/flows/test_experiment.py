from pathlib import Path
from typing import Any

import pytest
import yaml

from crnn.errors import SettingsError
from flows.definitions import _pruning, sparse_stage
from flows.experiment import Experiment, load_experiment
from tests.flows.conftest import TINY

PARAMS = Path(__file__).parents[2] / "params"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_params_file_is_valid_and_is_headed_by_its_command(path: Path) -> None:
    assert load_experiment(path).name == path.stem
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# crnn-slim frontier params/{path.name}"


def test_overrides_and_ratios_replace_what_the_file_says(tiny: Path) -> None:
    changes = ["sparse.epochs=7", "model.width=0.5", "seed=3"]
    experiment = load_experiment(tiny, changes, [0.9, 0.5, 0.9])
    assert experiment.sparse.epochs == 7
    assert experiment.model.width == 0.5
    assert experiment.seed == 3
    assert experiment.ratios == (0.5, 0.9)


def test_cuts_that_are_off_are_in_no_key(tiny: Path) -> None:
    plain = _pruning(load_experiment(tiny))
    assert {"lstm_ratio", "head_rank", "head_rows"}.isdisjoint(plain)
    off = ["prune.lstm_ratio=0", "prune.head_rank=null", "prune.head_rows=0"]
    assert _pruning(load_experiment(tiny, off)) == plain
    on = {"lstm_ratio": 0.5, "head_rank": 2, "head_rows": 1}
    changes = [f"prune.{name}={value}" for name, value in on.items()]
    assert _pruning(load_experiment(tiny, changes)) == {**plain, **on}


def test_branches_that_stay_are_in_no_key(tiny: Path) -> None:
    upstream: dict[str, Any] = {"data": None, "baseline": None}
    changes = ([], ["sparse.drop_branches=false"], ["sparse.drop_branches=true"])
    plain, off, on = (sparse_stage(load_experiment(tiny, c), upstream, 0) for c in changes)
    assert "drop_branches" not in plain.settings["train"]
    assert off == plain
    assert on.settings["train"] == {**plain.settings["train"], "drop_branches": True}


def test_controls_belong_to_ratios_all_of_them_unless_some_are_named(tiny: Path) -> None:
    every = load_experiment(tiny, ["controls.small=true"]).controls
    assert [every.kinds(ratio) for ratio in (0.3, 0.6)] == [["small"], ["small"]]
    named = load_experiment(tiny, ["controls={scratch: true, small: true, ratios: [0.6]}"]).controls
    assert [named.kinds(ratio) for ratio in (0.3, 0.6)] == [[], ["scratch", "small"]]
    assert load_experiment(tiny).controls.kinds(0.3) == []
    of_one = load_experiment(tiny, ["controls={small: true, ratios: [0.3, 0.6]}"], [0.6, 0.7])
    assert of_one.controls.ratios == (0.6,), "those that are not computed are left out"
    for slip in ("null", "0.6"):
        changes = [f"ratios={slip}", "controls={small: true, ratios: [0.3]}"]
        with pytest.raises(SettingsError, match="among the experiment's ratios"):
            load_experiment(tiny, changes, [0.6])
    targets_alone = ["ratios=[]", "prune.targets.params=9", "controls.small=true"]
    with pytest.raises(SettingsError, match="controls belong to ratios"):
        load_experiment(tiny, targets_alone)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparse.epoch=3", r"unknown key 'sparse.epoch'; did you mean 'epochs'"),
        ("spars.epochs=3", r"unknown key 'spars'; did you mean 'sparse'"),
        ("sparse.epochs=0", r"sparse.epochs: .*greater than or equal to 1, not 0"),
        ("sparse.epochs=many", r"sparse.epochs: .*integer.*not 'many'"),
        ("ratios=[1.0]", r"less than 1, not 1.0"),
        ("ratios=[-0.1]", r"greater than or equal to 0, not -0.1"),
        ("ratios=[0.12345]", r"at most four decimals"),
        ("ratios=[]", r"tiny.yaml: give ratios, prune.targets, or both$"),
        ("model.width=.nan", r"finite number"),
        ("model.width=.inf", r"model.width: .*not inf"),
        ("sparse.method=magic", r"'proximal' or 'polarization', not 'magic'"),
        ("name=a/b", r"name: "),
        ("seed", r"takes section.key=value; 'seed' has no '='"),
        ("name.x=1", r"'name' is a value, not a section"),
        ("seed=[", r"the value is not YAML"),
        ("seed=!!int abc", r"the value is not YAML: invalid literal for int"),
        ("seed=!!int ''", r"the value is not YAML"),
        ("seed=" + "[" * 5000, r"the value is not YAML: it is nested too deeply"),
        ("seed=2024-13-45", r"seed: .*integer.*not '2024-13-45'"),
        ("notify.command=' '", r"notify.command: a command has at least one word, not ' '"),
        ('notify.command="it\'s"', r"notify.command: the command's quotes do not match"),
        ("prune.targets.params=0", r"prune.targets.params: .*greater than 0, not 0"),
        ("prune.targets.size=2", r"unknown key 'prune.targets.size'; did you mean 'size_mb'"),
        ("seeds=[]", r"seeds: at least 1 item is needed, not \[\]$"),
        ("seeds=[1, 1]", r"seeds: each seed is given once, not \[1, 1\]"),
        ("seeds=[-1]", r"greater than or equal to 0, not -1"),
        ("ratios=0.7", r"ratios: a list in brackets is needed, not 0\.7$"),
        ("controls.ratios=0.7", r"controls\.ratios: a list in brackets is needed, not 0\.7$"),
        ("controls.scrach=true", r"unknown key 'controls.scrach'; did you mean 'scratch'"),
        ("controls.ratios=[0.3, 0.7]", r"among the experiment's ratios \(0.3, 0.6\); 0.7 is not$"),
        ("controls.ratios=[0.12345]", r"at most four decimals"),
        ("controls.ratios=[0.3]", r"controls.ratios needs controls.scratch or controls.small"),
        ("prune.lstm_ratio=1", r"prune.lstm_ratio: .*less than 1, not 1"),
        ("prune.head_rank=0", r"prune.head_rank: .*greater than or equal to 1, not 0"),
        ("prune.head_rows=9", r"prune: head_rows 9 needs a head_rank, for the classes without"),
        (
            "sparse={method: proximal, strength: 1, drop_branches: true, epochs: 1}",
            r"sparse: drop_branches needs method auto, not proximal",
        ),
        ("model.backbone=MobileNetV3-small_100", r"did you mean mobilenetv3_small_100\?"),
        ("baseline.distill=1", r"baseline.distill needs a teacher section"),
        ("teacher={checkpoint: a, epochs: 0, model: {hidden: 8}}", r"leave out model, or it$"),
        ("data.train=true", r"data.train: takes no true or false, not True"),
        ("baseline.epochs=true", r"baseline.epochs: takes no true or false, not True"),
        ("baseline.epochs=yes", r"baseline.epochs: .*integer.*not 'yes'"),
        ("ratios=[no, 0.5]", r"ratios.0: .*number.*not 'no'"),
        ("execution.parallel=on", r"execution.parallel: .*integer.*not 'on'"),
        ("export=false", r"export: null switches it off, not False"),
        (
            "quantize=off",
            r"quantize: a section, or null, which switches it off, is needed, not 'off'$",
        ),
        ("controls=true", r"controls: a section is needed, not True$"),
        ("baseline=null", r"baseline: a section is needed, not None$"),
        ("data.train=null", r"data.train: text or an integer is needed, not None$"),
        ("data.train=1.5", r"data.train: text or an integer is needed, not 1.5$"),
        (
            "execution.parallel=all",
            r"execution.parallel: 'auto' or an integer is needed, not 'all'$",
        ),
        ("execution.store=/mnt/x", r"begins with s3://, gs://, az:// or file://, not '/mnt/x'$"),
        ("execution.rendezvous=host", r"such as first.example:29400, not 'host'$"),
        ("name=Default", r"name: .*and is not Default, which is MLflow's own, not 'Default'$"),
        ("name=my name", r"name: a name has letters, .*, not 'my name'$"),
        ("notify.webhook=me", r"begins with http:// or https://, not 'me'$"),
        ("epochs=3", r"unknown key 'epochs'; did you mean baseline.epochs or .*finetune.epochs"),
        ("baseline.augment.rotate=1", r"'baseline.augment.rotate'; known here: affine, blur"),
        ("prune.targets={size_mb: 1, size_mb: 2}", r"key 'size_mb' is given twice"),
        ("sparse.method=proximal", r"which need it.*method proximal, strength None"),
        ("sparse.strength=0.1", r"for no other; method auto, strength 0.1"),
    ],
)
def test_each_mistake_in_a_setting_is_one_sentence(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_experiment(tiny, [override])
    assert "\n" not in str(caught.value)


def test_a_number_is_what_it_looks_like(tiny: Path) -> None:
    dated = load_experiment(tiny, ["data.licence=2024-01-01"])
    assert dated.data.licence == "2024-01-01"
    numbers = ["seed=010", "data.train=12_000", "prune.targets.params=1e6", "prune.min_ratio=1e-1"]
    given = load_experiment(tiny, [*numbers, "prune.compensate=no"])
    assert (given.seed, given.data.train, given.prune.compensate) == (10, 12_000, False)
    assert (given.prune.targets.params, given.prune.min_ratio) == (1_000_000, 0.1)


def test_a_teacher_has_somebody_to_teach_and_time_for_it(tiny: Path) -> None:
    with pytest.raises(SettingsError, match="the teacher teaches no network that is cut"):
        load_experiment(tiny, ["teacher={epochs: 1}", "sparse.distill=0"])
    unheard = ["teacher={epochs: 1}", "sparse.distill=0", "finetune={epochs: 0, distill: 1}"]
    with pytest.raises(SettingsError, match="the teacher teaches no network that is cut"):
        load_experiment(tiny, unheard)
    aside = ["sparse.from_baseline=false", "baseline.distill=1"]
    with pytest.raises(SettingsError, match="the teacher teaches no network that is cut"):
        load_experiment(tiny, [*unheard[:2], *aside])
    own = ["baseline={checkpoint: a, epochs: 0, distill: 1}", "teacher={epochs: 1}"]
    with pytest.raises(SettingsError, match="needs epochs to learn in"):
        load_experiment(tiny, own)
    given = load_experiment(tiny, ["teacher={checkpoint: a, epochs: 0}"])
    assert Experiment.model_validate(given.model_dump(mode="json")) == given, "as schedule has it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold sections"),
        ("- a\n", "must hold sections"),
        ("a: [", "is not YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("name: a\nname: b\n", "'name' is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("name: a\nsparce: {epochs: 1}\n", "unknown key 'sparce'; did you mean 'sparse'"),
        ("name: a\ndata: {train: 5, vall: 5}\n", "unknown key 'data.vall'; did you mean 'val'"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        ("name: a\ndata: {train: 1, val: 1}\nbaseline: {epochs: 1}\n", "key 'sparse' is needed"),
    ],
)
def test_each_mistake_in_a_file_is_one_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        load_experiment(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.yaml"):
        load_experiment(tmp_path / "gone.yaml")
