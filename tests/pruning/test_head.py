"""The head of two layers against the best approximation of its rank, in float64."""

import pytest
import torch

from crnn.errors import SettingsError
from crnn.networks.recogniser import two_layer_head
from pruning.cost import macs, parameters
from pruning.head import cut_head, factorise
from tests.conftest import random_recogniser


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
    thin = random_recogniser()
    thin.head = two_layer_head(16, 1, 11).double()
    with pytest.raises(SettingsError, match="27 weights are no less than its 27; leave it out"):
        cut_head(thin, 1)
