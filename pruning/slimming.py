"""The whole cut of a network: channels, then hidden units of the LSTM, then the head."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from crnn.data.batches import Lines, evaluation_batches, normalise
from crnn.devices import best_device
from crnn.networks.recogniser import Recogniser
from pruning.head import cut_head, frames_of
from pruning.lstm import cut_units, keep_units, outputs_of
from pruning.settings import PruneSettings
from pruning.surgery import cut, mean_inputs

Seen = TypeVar("Seen")


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
        settings: Share of hidden units to remove, rank and rows of the head.
        lines: Where to see what is removed, so that what is left can say it: channels their mean,
            hidden units what the others say of them, the head what it reads. None drops it.

    Raises:
        SettingsError: The head's rank and rows save nothing.
    """
    sample = None if lines is None else lines.sample(settings.calibration_lines)
    compact = cut(model, masks, _seen(mean_inputs, model, sample))
    if settings.lstm_ratio:
        units = keep_units(compact, settings.lstm_ratio)
        compact = cut_units(compact, units, _seen(outputs_of, compact, sample))
    if settings.head_rank is not None:
        frames = _seen(frames_of, compact, sample)
        compact = cut_head(compact, settings.head_rank, settings.head_rows, frames)
    return compact


def _seen(
    statistics: Callable[[Recogniser, Iterable[Tensor]], Seen],
    model: Recogniser,
    lines: Lines | None,
) -> Seen | None:
    """Statistics of a network that is on the CPU, taken on the best device; None without lines."""
    if lines is None:
        return None
    seen = statistics(model.to(best_device()), _images(lines))
    model.cpu()
    return seen


def _images(lines: Lines) -> Iterator[Tensor]:
    """Batches (N, 3, 32, W) in [-1, 1], where the network is."""
    for batch in evaluation_batches(lines):
        yield normalise(batch.images.to(best_device()))
