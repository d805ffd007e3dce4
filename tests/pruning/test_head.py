"""The head of two layers against the best approximation of its rank, in float64."""

import pytest
import torch

from crnn.errors import SettingsError
from crnn.networks.recogniser import Recogniser
from pruning.cost import macs, parameters
from pruning.head import Frames, cut_head, factorise, frames_of, head_readers, whole_weight
from pruning.moments import Moments
from tests.conftest import HEADS, give_head, random_recogniser


@pytest.mark.parametrize("shape", [(11, 16), (40, 16), (16, 16), (3, 2)])
def test_full_rank_is_the_matrix_itself(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    first, then = factorise(weight, min(shape))
    assert (then @ first - weight).abs().max() < 1e-9


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_is_that_of_the_best_approximation_of_the_rank(rank: int) -> None:
    """Eckart and Young 1936: the root of the sum of the squared singular values left out.

    The squared singular values are the eigenvalues of W W', from another routine than the SVD.
    """
    model = random_recogniser()
    weight = model.head.weight.detach()
    head = cut_head(model, rank).head
    product = (head[1].weight @ head[0].weight).detach()
    assert torch.linalg.matrix_rank(product) == rank
    dropped = torch.linalg.eigvalsh(weight @ weight.T)[:-rank]
    assert float((product - weight).norm()) == pytest.approx(float(dropped.sum().sqrt()), rel=1e-9)
    assert torch.equal(head[1].bias, model.head.bias)


def images_of_lines() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 32, width, dtype=torch.float64) for width in (64, 96)]


@torch.inference_mode()
def logits_of(model: Recogniser) -> torch.Tensor:
    """Of all frames of the lines, (frames, K)."""
    return torch.cat([model(images).flatten(0, 1) for images in images_of_lines()])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_with_frames_the_error_of_the_logits_is_the_least_of_the_rank(rank: int) -> None:
    """Eckart and Young again, in logits of which each class counts by its share.

    What is left out are eigenvalues of the covariance of these logits, computed from them alone.
    """
    model = random_recogniser()
    before = logits_of(model)
    compact = cut_head(model, rank, frames=frames_of(model, images_of_lines()))
    error = logits_of(compact) - before
    shares = before.softmax(1).mean(0)
    spread = torch.cov(before.T * shares.sqrt()[:, None], correction=0)
    dropped = torch.linalg.eigvalsh(spread)[:-rank]
    weighted = float((error.square().mean(0) * shares).sum())
    assert weighted == pytest.approx(float(dropped.sum()), rel=1e-5)
    assert error.mean(0).abs().max() < 1e-12
    worse = logits_of(cut_head(model, rank)) - before
    assert weighted < float((worse.square().mean(0) * shares).sum())


def test_classes_that_no_line_has_take_no_rank() -> None:
    """Ten rows that are never read, as large as the two that are."""
    torch.manual_seed(0)
    weight = torch.randn(12, 16, dtype=torch.float64)
    shares = torch.tensor([0.5, 0.5] + 10 * [0.0], dtype=torch.float64)
    frames = Frames(Moments(torch.zeros(16).double(), torch.eye(16).double()), shares)
    first, then = factorise(weight, 2, frames)
    assert torch.allclose((then @ first)[:2], weight[:2])
    blind_first, blind_then = factorise(weight, 2)
    assert not torch.allclose((blind_then @ blind_first)[:2], weight[:2], atol=0.1)


def test_outputs_that_never_vary_are_no_obstacle() -> None:
    weight = torch.randn(12, 16)
    still = Moments(torch.ones(16).double(), torch.zeros(16, 16).double())
    frames = Frames(still, torch.ones(12) / 12)
    assert all(matrix.isfinite().all() for matrix in factorise(weight, 3, frames))


def test_a_head_that_has_the_rank_is_reproduced() -> None:
    model = random_recogniser()
    whole = model.head.weight.data
    whole.copy_(torch.randn(11, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    compact = cut_head(model, 2)
    with torch.inference_mode():
        assert (model(images) - compact(images)).abs().max() < 1e-9
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_head_of_two_layers_is_cut_again() -> None:
    model = random_recogniser()
    again = cut_head(cut_head(model, 5), 2).head
    once = cut_head(model, 2).head
    assert torch.allclose(again[1].weight @ again[0].weight, once[1].weight @ once[0].weight)


@pytest.mark.parametrize("head", HEADS)
def test_the_whole_weight_is_what_the_head_multiplies_by(head: tuple[int | None, int]) -> None:
    model = random_recogniser()
    give_head(model, *head)
    frames = torch.randn(5, 16, dtype=torch.float64)
    *_, bias = model.head.parameters()
    with torch.inference_mode():
        expected = model.head(frames)
        assert (frames @ whole_weight(model).T + bias - expected).abs().max() < 1e-12
        for name in head_readers(model):
            model.get_parameter(name).zero_()
        assert torch.equal(model.head(frames), bias.expand(5, 11)), "nothing else reads"


@pytest.mark.parametrize("rank", [1, 3])
def test_classes_that_are_read_most_keep_their_row_and_the_rank_serves_the_others(
    rank: int,
) -> None:
    """Eckart and Young once more, in the logits of the others alone."""
    model = random_recogniser()
    before = logits_of(model)
    frames = frames_of(model, images_of_lines())
    compact = cut_head(model, rank, 3, frames)
    error = logits_of(compact) - before
    own = frames.shares.topk(3).indices.sort().values
    assert torch.equal(compact.head.classes, own)
    assert error[:, own].abs().max() < 1e-12
    counted = before.softmax(1).mean(0).index_fill(0, own, 0)
    spread = torch.cov(before.T * counted.sqrt()[:, None], correction=0)
    dropped = float(torch.linalg.eigvalsh(spread)[:-rank].sum())
    assert float((error.square().mean(0) * counted).sum()) == pytest.approx(dropped, rel=1e-5)
    assert error.mean(0).abs().max() < 1e-12


def test_without_frames_the_largest_rows_stay() -> None:
    model = random_recogniser()
    weight = model.head.weight.data
    weight[[2, 9]] *= 10
    compact = cut_head(model, 2, 2)
    assert compact.head.classes.tolist() == [2, 9]
    found = whole_weight(compact)
    assert torch.equal(found[[2, 9]], weight[[2, 9]])
    others = weight.index_fill(0, torch.tensor([2, 9]), 0)
    dropped = torch.linalg.eigvalsh(others @ others.T)[:-2]
    assert float((found - weight).norm()) == pytest.approx(float(dropped.sum().sqrt()), rel=1e-9)


def test_a_head_with_rows_is_cut_again() -> None:
    model = random_recogniser()
    give_head(model, 3, 3)
    with torch.inference_mode():
        for name in ("head.low_rank.0.weight", "head.low_rank.1.weight"):
            model.get_parameter(name).mul_(0.01)
    again = cut_head(model, 3, 2)
    assert parameters(again)["head"] == parameters(model)["head"] - 16
    assert set(again.head.classes.tolist()) < set(model.head.classes.tolist())
    assert (whole_weight(again) - whole_weight(model)).abs().max() < 0.01


def test_cost_counts_rows() -> None:
    model = random_recogniser().float()
    compact = cut_head(model, 3, 2)
    weights = 3 * (16 + 11) + 2 * 16
    assert parameters(compact)["head"] == weights + 11
    assert macs(model) - macs(compact) == 32 * (16 * 11 - weights)


def test_cost_counts_both_layers() -> None:
    model = random_recogniser().float()
    compact = cut_head(model, 3)
    saved = 16 * 11 - 3 * (16 + 11)
    assert parameters(compact)["head"] == 3 * (16 + 11) + 11
    assert macs(model) - macs(compact) == 32 * saved


def test_a_rank_that_saves_nothing_is_refused_and_the_named_one_works() -> None:
    model = random_recogniser()
    rule = r"7 x \(16 \+ 11\) = 189 weights are no less than its 176; set it to at most 6"
    with pytest.raises(SettingsError, match=rule):
        cut_head(model, 7)
    assert parameters(cut_head(model, 6))["head"] < parameters(model)["head"]
    rule = r"4 x \(16 \+ 11\) \+ 5 x 16 = 188 .* its 176; set it to at most 3, or set prune"
    with pytest.raises(SettingsError, match=rule):
        cut_head(model, 4, 5)
    assert parameters(cut_head(model, 3, 5))["head"] < parameters(model)["head"]
    rule = r"203 .* its 176; set prune\.head_rows lower, or leave both out"
    with pytest.raises(SettingsError, match=rule):
        cut_head(model, 1, 11)
    assert parameters(cut_head(model, 1, 9))["head"] < parameters(model)["head"]
    with pytest.raises(SettingsError, match=r"205 .* its 176; set it to at most 5, or leave both"):
        cut_head(model, 7, 1)
    thin = random_recogniser()
    give_head(thin, 1)
    with pytest.raises(SettingsError, match="27 weights are no less than its 27; leave it out"):
        cut_head(thin, 1)
