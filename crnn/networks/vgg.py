"""The VGG13 backbone that reads 32-pixel-high text lines."""

from torch import nn

CHANNELS = (64, 64, 128, 128, 256, 256, 512, 512, 512, 512)
"""Output channels of the ten convolutions at width 1."""

STRIDE = 4
"""Pixels of image width for each frame of the output."""


def vgg13(width: float = 1.0) -> tuple[nn.Sequential, int]:
    """Build the backbone: images (N, 3, 32, W) to features (N, C, 1, W // 4).

    VGG13 (Simonyan and Zisserman 2015, configuration B) with BatchNorm. The last two pools and
    the last convolution halve the height only, so that a frame stays 4 pixels wide.

    Args:
        width: Factor on the channels of every layer, at least one channel each.

    Returns:
        The backbone and C, its number of output channels.
    """
    channels = [max(1, round(c * width)) for c in CHANNELS]
    pools = {
        1: nn.MaxPool2d(2, 2),
        3: nn.MaxPool2d(2, 2),
        5: nn.MaxPool2d(2, (2, 1), padding=(0, 1)),
        7: nn.MaxPool2d(2, (2, 1)),
    }
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(zip([3, *channels], channels, strict=False)):
        stride = (2, 1) if index == len(channels) - 1 else 1
        layers += [
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
        if index in pools:
            layers.append(pools[index])
    return nn.Sequential(*layers), channels[-1]
