"""The CTC head as a product of two matrices of low rank."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from crnn.checkpoint import recogniser_of
from crnn.errors import SettingsError
from crnn.networks.recogniser import Recogniser
from pruning.moments import TINY, Moments, Sums


def head_names(model: Recogniser) -> list[str]:
    """Of the head's tensors: one weight or two, in the order they are applied, and the bias."""
    return [f"head.{name}" for name in model.head.state_dict()]


@dataclass(frozen=True)
class Frames:
    """What a head reads and says over the frames of many lines.

    Attributes:
        read: What the LSTM says to it, F numbers.
        shares: Mean probability of each class, (K,), float64.
    """

    read: Moments
    shares: Tensor


@torch.inference_mode()
def frames_of(model: Recogniser, images: Iterable[Tensor]) -> Frames:
    """Statistics of the head over lines and frames.

    Args:
        model: Evaluated with its running statistics.
        images: Batches (N, 3, 32, W), normalised.
    """
    read = Sums(2 * model.rnn.hidden_size, model.device)
    shares = torch.zeros(model.classes, dtype=torch.double, device=model.device)
    model.eval()
    for batch in images:
        outputs, _ = model.rnn(model.features(batch))
        read.add(outputs)
        shares += model.head(outputs).double().softmax(2).sum((0, 1))
    return Frames(read.moments(), (shares / shares.sum()).cpu())


def factorise(weight: Tensor, rank: int, frames: Frames | None = None) -> tuple[Tensor, Tensor]:
    """The two matrices whose product is nearest to a matrix.

    Nearest in the Frobenius norm, by truncated SVD (Eckart and Young 1936), as Xue et al. 2013
    ("Restructuring of deep neural network acoustic models with singular value decomposition").
    Where frames are given, nearest in what it makes of these instead: the mean over the frames of
    the squared errors of the logits, each class counted by its share. So a rank is spent on what is
    read and told apart, and none on the many rows of a large charset that no line has. Both
    matrices are scaled alike for fine-tuning: each row of the first has the norm of its column of
    the second.

    Args:
        weight: (K, F), float.
        rank: Of the product, from 1 to min(K, F).
        frames: Of the head that has the weight, or None.

    Returns:
        What is applied first, (rank, F), and then, (K, rank), both float64.
    """
    classes, features = weight.shape
    basis, counts = torch.eye(features).double(), torch.ones(classes).double()
    if frames is not None:
        basis = torch.linalg.cholesky(frames.read.covariance + TINY * basis)
        counts = frames.shares.sqrt()
    read = weight.double() @ basis
    right = torch.linalg.svd(counts[:, None] * read, full_matrices=False).Vh[:rank]
    first, then = torch.linalg.solve(basis, right, left=False), read @ right.T
    scale = (then.norm(dim=0) / first.norm(dim=1)).sqrt().clamp(min=TINY)
    return scale[:, None] * first, then / scale


def cut_head(model: Recogniser, rank: int, frames: Frames | None = None) -> Recogniser:
    """Build the network whose head goes through `rank` numbers a frame.

    Args:
        model: Left as it is; its head may be of two layers already.
        rank: At least 1.
        frames: Of the model. Their mean logits stay as they are: what the lower rank adds to these
            is taken off the bias. None leaves the bias alone.

    Raises:
        SettingsError: The two layers would have as many weights as the head has now, or more.
    """
    tensors = model.state_dict()
    *weights, bias = head_names(model)
    whole = tensors[weights[0]]
    for name in weights[1:]:
        whole = tensors[name] @ whole
    _refuse_useless(rank, whole, sum(tensors[name].numel() for name in weights))
    first, then = factorise(whole, rank, frames)
    shift = tensors[bias].double()
    if frames is not None:
        shift = shift + (whole.double() - then @ first) @ frames.read.mean
    head = {"head.0.weight": first, "head.1.weight": then, "head.1.bias": shift}
    kept = {name: t.clone() for name, t in tensors.items() if not name.startswith("head.")}
    kept |= {name: tensor.to(whole.dtype).contiguous() for name, tensor in head.items()}
    return recogniser_of(model.settings, model.classes, kept)


def _refuse_useless(rank: int, weight: Tensor, present: int) -> None:
    classes, features = weight.shape
    if rank * (features + classes) < present:
        return
    most = (present - 1) // (features + classes)
    mend = f"set it to at most {most}, or leave it out" if most else "leave it out"
    raise SettingsError(
        f"prune.head_rank has to make the head smaller; {rank} x ({features} + {classes}) ="
        f" {rank * (features + classes)} weights are no less than its {present}; {mend}"
    )
