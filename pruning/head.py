"""The CTC head as a product of two matrices of low rank, and whole rows for some classes."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from crnn.checkpoint import recogniser_of
from crnn.errors import SettingsError
from crnn.networks.recogniser import Recogniser
from pruning.moments import TINY, Moments, Sums

READERS = ("weight", "0.weight", "rows.weight", "low_rank.0.weight")
"""Of the tensors of the heads there are, those that read what the LSTM says."""


def head_readers(model: Recogniser) -> list[str]:
    """Weights of the head whose columns (2 x hidden, forward first) read the LSTM."""
    return [f"head.{name}" for name in model.head.state_dict() if name in READERS]


@torch.inference_mode()
def whole_weight(model: Recogniser) -> Tensor:
    """The one matrix, (K, 2 x hidden), float64, that the head multiplies by, however it is made."""
    head = copy.deepcopy(model.head).double()
    *_, bias = head.parameters()
    bias.zero_()
    product: Tensor = head(torch.eye(2 * model.rnn.hidden_size).double())
    return product.T


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


def cut_head(
    model: Recogniser, rank: int, rows: int = 0, frames: Frames | None = None
) -> Recogniser:
    """Build the network whose head goes through `rank` numbers a frame.

    Args:
        model: On the CPU, left as it is; its head may have been cut already.
        rank: At least 1.
        rows: How many classes keep their row of weights besides: those of the largest share of the
            frames or, without frames, of the largest norm. The rank is spent on the others.
        frames: Of the model. Their mean logits stay as they are: what the lower rank adds to these
            is taken off the bias. None leaves the bias alone.

    Raises:
        SettingsError: The new head would have as many weights as there are now, or more.
    """
    _refuse_useless(rank, rows, model)
    whole = whole_weight(model)
    read = whole.norm(dim=1) if frames is None else frames.shares
    own = read.argsort(descending=True, stable=True)[:rows].sort().values
    others = whole.index_fill(0, own, 0)
    first, then = factorise(others, rank, frames)
    *_, bias = model.head.parameters()
    shift = bias.detach().double()
    if frames is not None:
        shift = shift + (others - then @ first) @ frames.read.mean
    kept = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("head.")}
    head = {"0.weight": first, "1.weight": then, "1.bias": shift}
    if rows:
        kept["head.classes"] = own
        head = {f"low_rank.{name}": tensor for name, tensor in head.items()}
        head["rows.weight"] = whole[own]
    kept |= {f"head.{name}": t.to(model.dtype).contiguous() for name, t in head.items()}
    return recogniser_of(model.settings, model.classes, kept)


def _refuse_useless(rank: int, rows: int, model: Recogniser) -> None:
    *weights, bias = model.head.parameters()
    features, classes = 2 * model.rnn.hidden_size, len(bias)
    present = sum(weight.numel() for weight in weights)
    count = rank * (features + classes) + rows * features
    if count < present:
        return
    most = (present - rows * features - 1) // (features + classes)
    mends = [f"set it to at most {most}"] if most > 0 else []
    if count - rows * features < present and rows:
        mends.append("set prune.head_rows lower")
    mends.append("leave both out" if rows else "leave it out")
    own = f" + {rows} x {features}" * (rows > 0)
    raise SettingsError(
        f"prune.head_rank has to make the head smaller; {rank} x ({features} + {classes}){own} ="
        f" {count} weights are no less than its {present}; {', or '.join(mends)}"
    )
