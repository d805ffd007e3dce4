"""The form of a network that ships: branches that only training needs, folded away."""

import copy
from typing import Any

from torch import nn

from crnn.networks.recogniser import Recogniser
from crnn.settings import VGG13


def deployed(model: Recogniser) -> Recogniser | None:
    """The same function with fewer layers; None where the network has none too many.

    Structural re-parameterisation of RepVGG (Ding et al. 2021, arXiv:2101.03697): a block's
    convolutions, BatchNorms and identity become one convolution. For evaluation only.

    Args:
        model: In its training form; left as it is.
    """
    if model.settings.backbone == VGG13:
        return None
    from timm.models import reparameterize_model

    folded = copy.deepcopy(model).eval()
    blocks_of(folded)  # timm folds them by their groups, which it sets right.
    # RepViT's new layers are of float32, whatever the old ones were.
    folded.cnn = reparameterize_model(folded.cnn, inplace=True).to(model.dtype)
    return None if folded.state_dict().keys() == model.state_dict().keys() else folded


def blocks_of(model: Recogniser) -> list[tuple[Any, nn.Conv2d]]:
    """Blocks of RepVGG and MobileOne, which ship as one convolution, and one that is shaped as it.

    Their _get_kernel_bias gives its weight and bias, once their groups are those of the cut
    network, which is seen to here.
    """
    found = []
    block: Any
    for block in model.modules():
        if hasattr(block, "_get_kernel_bias") and hasattr(block, "conv_kxk"):
            shaped = next(m for m in block.conv_kxk.modules() if isinstance(m, nn.Conv2d))
            block.groups = shaped.groups  # MobileOne's knows the uncut number alone.
            found.append((block, shaped))
    return found
