"""Mean and covariance of frames, and what one number tells of another, against torch's own."""

import pytest
import torch
from torch import Tensor

from pruning.moments import Moments, Sums

KNOWN = torch.tensor([True, False, True, True, False, True])


def frames_that_hang_together(count: int) -> Tensor:
    """(count, 6), of which no number is independent of the others, and none follows from them."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + torch.arange(6)


def moments_of(frames: Tensor) -> Moments:
    sums = Sums(frames.shape[1], frames.device)
    for batch in frames.split(70):
        sums.add(batch.unflatten(0, (-1, 2)))
    return sums.moments()


def test_they_are_those_of_all_frames() -> None:
    frames = frames_that_hang_together(300)
    found = moments_of(frames)
    assert torch.allclose(found.mean, frames.mean(0))
    assert torch.allclose(found.covariance, torch.cov(frames.T, correction=0))
    part = found.of(slice(2, 5))
    assert torch.allclose(part.covariance, torch.cov(frames[:, 2:5].T, correction=0))
    assert torch.allclose(part.mean, frames[:, 2:5].mean(0))


def test_a_prediction_is_that_of_least_squares() -> None:
    frames = frames_that_hang_together(300)
    weight, bias = moments_of(frames).predict(KNOWN)
    with_one = torch.cat([frames[:, KNOWN], torch.ones(300, 1).double()], 1)
    best = torch.linalg.lstsq(with_one, frames[:, ~KNOWN]).solution
    found = torch.cat([weight.T, bias[None]])
    assert torch.allclose(found, best, rtol=0.01, atol=0.01)
    assert (found - best).abs().max() > 0, "the ridge is there"


@pytest.mark.parametrize("count", [2, 300])
def test_what_never_varies_is_predicted_as_it_is(count: int) -> None:
    frames = torch.arange(6.0).double().expand(count, 6)
    weight, bias = moments_of(frames).predict(KNOWN)
    assert weight.abs().max() < 1e-6
    assert torch.allclose(bias, torch.tensor([1.0, 4.0]).double())


def test_few_frames_make_no_large_weights() -> None:
    """Of fewer frames than numbers everything would follow from anything."""
    few = torch.randn(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.arange(40) < 30
    weight, bias = moments_of(few).predict(known)
    assert weight.norm(dim=1).max() < 2
    assert torch.allclose(few[:, known] @ weight.T + bias, few[:, ~known], atol=0.01)
