"""The CTC head as a product of two matrices of low rank."""

import torch
from torch import Tensor

from crnn.checkpoint import recogniser_of
from crnn.errors import SettingsError
from crnn.networks.recogniser import Recogniser


def head_names(model: Recogniser) -> list[str]:
    """Of the head's tensors: one weight or two, in the order they are applied, and the bias."""
    return [f"head.{name}" for name in model.head.state_dict()]


def factorise(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two matrices whose product is nearest to a matrix, by truncated SVD.

    Nearest in the Frobenius norm (Eckart and Young 1936), as Xue et al. 2013 ("Restructuring of
    deep neural network acoustic models with singular value decomposition"). Deviation: each matrix
    gets the square root of the singular values, so that both are of one scale for fine-tuning.

    Args:
        weight: (K, F), float.
        rank: Of the product, from 1 to min(K, F).

    Returns:
        What is applied first, (rank, F), and then, (K, rank), of the weight's dtype.
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    roots = values[:rank].sqrt()
    first, then = roots[:, None] * right[:rank], left[:, :rank] * roots
    return first.to(weight.dtype).contiguous(), then.to(weight.dtype).contiguous()


def cut_head(model: Recogniser, rank: int) -> Recogniser:
    """Build the network whose head goes through `rank` numbers a frame; its bias stays.

    Args:
        model: Left as it is; its head may be of two layers already.
        rank: At least 1.

    Raises:
        SettingsError: The two layers would have as many weights as the head has now, or more.
    """
    tensors = model.state_dict()
    *weights, bias = head_names(model)
    whole = tensors[weights[0]]
    for name in weights[1:]:
        whole = tensors[name] @ whole
    _refuse_useless(rank, whole, sum(tensors[name].numel() for name in weights))
    first, then = factorise(whole, rank)
    kept = {name: t.clone() for name, t in tensors.items() if not name.startswith("head.")}
    kept |= {"head.0.weight": first, "head.1.weight": then, "head.1.bias": tensors[bias].clone()}
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
