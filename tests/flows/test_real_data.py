"""The real lines the params files point at. Skipped where they are absent."""

from pathlib import Path

import pytest

from flows.experiment import load_experiment
from flows.preview import check

PARAMS = Path(__file__).parents[2] / "params"


@pytest.mark.parametrize(
    ("name", "train", "val", "classes"), [("sroie", 8000, 1000, 64), ("plates", 750, 100, 45)]
)
def test_every_line_of_the_real_data_can_be_used(
    name: str, train: int, val: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PARAMS.parent)
    experiment = load_experiment(PARAMS / f"{name}.yaml")
    root = Path(experiment.data.root)
    if not root.is_dir():
        pytest.skip(f"no data at {root}; the README says how to make it")
    counts, bad = check(experiment)
    assert bad == []
    for split, lines in (("train", train), ("val", val)):
        found = counts[split]
        assert [found[of] for of in ("total", "usable", "bad", "squeezed")] == [lines, lines, 0, 0]
    assert len((root / "charset.txt").read_text(encoding="utf-8")) == classes
