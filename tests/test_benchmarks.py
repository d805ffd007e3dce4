"""What the benchmarks conclude from their rows."""

from benchmarks.slimming import _with_controls, best_inside, table

CUT = {"prune/ratio_requested": 0.5, "prune/ratio_achieved": 0.4, "prune/word_accuracy_before": 0.8}


def test_a_strength_at_the_edge_makes_the_grid_grow() -> None:
    assert best_inside((1, 2, 4), lambda strength: -abs(strength - 15)) == 16
    assert best_inside((1, 2, 4), lambda strength: -abs(strength - 2)) == 2
    assert best_inside((1, 2, 4), lambda strength: -strength) == 1 / 8, "six at most"


def test_controls_are_lines_of_their_own_below_the_same_ratio() -> None:
    rows = [
        {"point": "baseline"},
        {"point": "0.3", **CUT, "prune/ratio_requested": 0.3, "val/word_accuracy": 0.95},
        {"point": "0.5", **CUT, "val/word_accuracy": 0.9, "val/word_accuracy_std": 0.01},
        {"point": "scratch 0.5", "control": "scratch", "val/word_accuracy": 0.7},
        {"point": "small 0.5", "control": "small", "val/word_accuracy": 0.6},
    ]
    compared = _with_controls("auto", rows)
    assert table(compared, "val/word_accuracy")[2:] == [
        "| auto | 95.0% | 90.0% ± 1.0 (cut 0.40) |",
        "| auto: the same architecture from scratch |  | 70.0% |",
        "| auto: an uncut network as small |  | 60.0% |",
    ]
    assert table(compared, "prune/word_accuracy_before")[2:] == [
        "| auto | 80.0% | 80.0% (cut 0.40) |"
    ]
