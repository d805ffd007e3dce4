"""The CRNN: a convolutional backbone, a bidirectional LSTM and a CTC head."""

import torch
from torch import Tensor, nn

from crnn.networks.heads import expect_blanks
from crnn.networks.vgg import STRIDE, vgg13
from crnn.settings import VGG13, ModelSettings

INITIAL_GAMMA = 0.5
"""BatchNorm scale at the start (Liu et al. 2017, section 4.1)."""


class Recogniser(nn.Module):
    """CRNN of Shi et al. 2015 (arXiv:1507.05717): images to CTC logits.

    Attributes:
        cnn: The backbone: images (N, 3, 32, W) to features (N, C, 1, T), T = W // stride.
        rnn: Two bidirectional LSTM layers over the T frames.
        head: Features of a frame to K class logits, class 0 is the CTC blank; one linear layer, or
            one of networks/heads.py.
        stride: Pixels of image width for each frame.
    """

    def __init__(self, settings: ModelSettings, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.classes = classes
        self.stride = STRIDE
        self.cnn, channels = _backbone(settings)
        self.rnn = nn.LSTM(channels, settings.hidden, num_layers=2, bidirectional=True)
        self.head: nn.Module = nn.Linear(2 * settings.hidden, classes)
        if self.device.type != "meta":  # There torch would import its compiler, for a second.
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


def initialise(module: nn.Module) -> None:
    """Give a layer the initial weights of this network, where they are not torch's own."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            module.weight.mul_(module.groups**0.5)  # It counts the outputs of all groups as one's.
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, INITIAL_GAMMA)
