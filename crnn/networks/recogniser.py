"""The CRNN: a convolutional backbone, a bidirectional LSTM and a CTC head."""

import math

import torch
from torch import Tensor, nn

from crnn.networks.vgg import STRIDE, vgg13
from crnn.settings import VGG13, ModelSettings

INITIAL_GAMMA = 0.5
"""BatchNorm scale at the start (Liu et al. 2017, section 4.1)."""

BLANKS = 0.8
"""Probability of the CTC blank in every frame at the start."""


class Recogniser(nn.Module):
    """CRNN of Shi et al. 2015 (arXiv:1507.05717): images to CTC logits.

    Attributes:
        cnn: The backbone: images (N, 3, 32, W) to features (N, C, 1, T), T = W // stride.
        rnn: Two bidirectional LSTM layers over the T frames.
        head: Features of a frame to K class logits, class 0 is the CTC blank; one linear layer, or
            two as two_layer_head makes them.
        stride: Pixels of image width for each frame.
    """

    def __init__(self, settings: ModelSettings, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.classes = classes
        self.stride = STRIDE
        self.cnn, channels = _backbone(settings)
        self.rnn = nn.LSTM(channels, settings.hidden, num_layers=2, bidirectional=True)
        self.head: nn.Linear | nn.Sequential = nn.Linear(2 * settings.hidden, classes)
        if not self.head.weight.is_meta:  # There torch would import its compiler, for a second.
            self.apply(initialise)
            expect_blanks(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 32, W), float in [-1, 1], to logits (T, N, K), float32."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            # Recurrent sums lose digits in bf16, and this part is a small share of the time.
            frames, _ = self.rnn(features.to(self.dtype))
            logits: Tensor = self.head(frames)
            return logits

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, 32, W) to what the LSTM reads, (T, N, C)."""
        features: Tensor = self.cnn(images)
        return features.squeeze(2).permute(2, 0, 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype


def _backbone(settings: ModelSettings) -> tuple[nn.Module, int]:
    """The network that makes the features, and how many channels they have."""
    if settings.backbone == VGG13:
        return vgg13(settings.width)
    # timm and torchvision take seconds to import.
    from crnn.networks.timm_backbone import timm_backbone

    return timm_backbone(settings.backbone)


def two_layer_head(features: int, rank: int, classes: int) -> nn.Sequential:
    """A head of low rank: features to rank numbers, without a bias, and these to class logits."""
    return nn.Sequential(nn.Linear(features, rank, bias=False), nn.Linear(rank, classes))


def expect_blanks(head: nn.Module) -> None:
    """Let a fresh head read a blank in nearly every frame, whatever it sees.

    Most frames are blank. A head that begins with all classes alike learns just that in its first
    steps, with the largest gradients of the whole training, and it takes epochs to undo what these
    do to the layers below. A prior as that of Lin et al. 2017 (arXiv:1708.02002, section 4.1).

    Args:
        head: Whose last bias, (K,), is set; class 0 is the blank.
    """
    bias = list(head.parameters())[-1]
    nn.init.zeros_(bias)
    nn.init.constant_(bias[:1], math.log(BLANKS / (1 - BLANKS) * (len(bias) - 1)))


def initialise(module: nn.Module) -> None:
    """Give a layer the initial weights of this network, where they are not torch's own."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            module.weight.mul_(module.groups**0.5)  # It counts the outputs of all groups as one's.
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, INITIAL_GAMMA)
