"""The whole cut of a network: channels, then hidden units of the LSTM, then the head."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from crnn.data.batches import Lines, evaluation_batches, normalise
from crnn.devices import best_device
from crnn.networks.recogniser import Recogniser
from pruning.head import Frames, cut_head, frames_of
from pruning.lstm import cut_units, keep_units, mean_outputs
from pruning.settings import PruneSettings
from pruning.surgery import cut, mean_inputs


def slim(
    model: Recogniser,
    masks: Sequence[Tensor],
    settings: PruneSettings,
    lines: Lines | None = None,
) -> Recogniser:
    """Build the network that is left.

    Args:
        model: The uncut network, on the CPU; left as it is.
        masks: Channels to keep, as keep_masks gives them.
        settings: Share of hidden units to remove, rank of the head.
        lines: Where to take the mean of what is removed, which is then kept as a constant, and
            what the head reads. None drops it.

    Raises:
        SettingsError: The rank saves nothing.
    """
    sample = None if lines is None else lines.sample(settings.calibration_lines)
    compact = cut(model, masks, None if sample is None else _channel_means(model, sample))
    if settings.lstm_ratio:
        units = keep_units(compact, settings.lstm_ratio)
        compact = cut_units(
            compact, units, None if sample is None else _unit_means(compact, sample)
        )
    if settings.head_rank is not None:
        frames = None if sample is None else _frames(compact, sample)
        compact = cut_head(compact, settings.head_rank, frames)
    return compact


def _channel_means(model: Recogniser, lines: Lines) -> dict[str, Tensor]:
    means = mean_inputs(model.to(best_device()), _images(lines))
    model.cpu()
    return {name: mean.cpu() for name, mean in means.items()}


def _unit_means(model: Recogniser, lines: Lines) -> Tensor:
    means = mean_outputs(model.to(best_device()), _images(lines)).cpu()
    model.cpu()
    return means


def _frames(model: Recogniser, lines: Lines) -> Frames:
    frames = frames_of(model.to(best_device()), _images(lines))
    model.cpu()
    return frames


def _images(lines: Lines) -> Iterator[Tensor]:
    """Batches (N, 3, 32, W) in [-1, 1], where the network is."""
    for batch in evaluation_batches(lines):
        yield normalise(batch.images.to(best_device()))
