"""Which channels live and die together, and which entries of which tensors are theirs.

A sum, a depthwise convolution, a concatenation or a branch ties channels of several layers into one
decision. Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900) tells what depends
on what; here that becomes groups of channels, each of which is kept or cut by itself.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx
import torch
from torch import Tensor, nn

from crnn.checkpoint import DEPTHWISE
from crnn.data.images import HEIGHT
from crnn.networks.branches import last_norms, shortcuts_of
from crnn.networks.recogniser import Recogniser

LSTM = "rnn"
LSTM_INPUTS = ("rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse")
"""Tensors whose columns read the features."""

Side = tuple[str, str]
"""Name of a layer, and which of its channels: "in" or "out"."""

Axis = tuple[str, int]
"""Name of a tensor in the state dict, and one of its axes."""


@dataclass(frozen=True)
class Group:
    """Channels under one rule, each kept or cut by itself.

    Attributes:
        name: That of its first BatchNorm.
        size: C, the number of channels.
        norms: For each BatchNorm the channel that each of its entries is of, (n,) int64 in [0, C).
        axes: The same for every tensor and axis that has something of the channels.
        branch: Residual block that would lose nothing but its branch without these channels, by
            its name; None where they are not all of a branch, or it cannot go.
    """

    name: str
    size: int
    norms: dict[str, Tensor]
    axes: dict[Axis, Tensor]
    branch: str | None


_known: dict[tuple[object, ...], list[Group]] = {}


def groups_of(model: Recogniser) -> list[Group]:
    """The groups of a network, in forward order; of each architecture they are found once.

    Channels that no BatchNorm scales, such as the inner ones of squeeze-and-excitation, are in no
    group: nothing says how much they matter, so they stay.
    """
    layers = model.cnn.named_modules()
    shapes = tuple((name, m.weight.shape) for name, m in layers if isinstance(m, nn.Conv2d))
    architecture = (model.settings.backbone, shapes)
    if architecture not in _known:
        _known[architecture] = _find_groups(model)
    return _known[architecture]


def _find_groups(model: Recogniser) -> list[Group]:
    modules = dict(model.named_modules())
    order = {name: place for place, name in enumerate(modules)}
    blocks = last_norms(model)
    sides: dict[Side, dict[int, int]] = {}
    for channel, entries in enumerate(networkx.connected_components(_dependent_entries(model))):
        for side, entry in entries:
            sides.setdefault(side, {})[entry] = channel
    shared = networkx.Graph((channel, side) for side, c in sides.items() for channel in c.values())
    groups = []
    for part in networkx.connected_components(shared):
        members = sorted((m for m in part if m in sides), key=lambda side: order[side[0]])
        if any(isinstance(modules[name], nn.BatchNorm2d) for name, _ in members):
            groups.append(_group({m: sides[m] for m in members}, modules, blocks))
    return sorted(groups, key=lambda group: order[group.name])


def _group(
    sides: dict[Side, dict[int, int]], modules: dict[str, nn.Module], blocks: Iterable[str]
) -> Group:
    """Number the channels of some layers in the order in which they appear."""
    numbers: dict[int, int] = {}
    norms: dict[str, Tensor] = {}
    axes: dict[Axis, Tensor] = {}
    for side, channels in sides.items():
        ordered = [channels[entry] for entry in sorted(channels)]
        entries = torch.tensor([numbers.setdefault(c, len(numbers)) for c in ordered])
        if isinstance(modules[side[0]], nn.BatchNorm2d):
            norms[side[0]] = entries
        axes |= dict.fromkeys(_axes(side, modules[side[0]]), entries)
    inside = (b for b in blocks if all(name.startswith(f"{b}.") for name, _ in sides))
    return Group(next(iter(norms)), len(numbers), norms, axes, next(inside, None))


def _axes(side: Side, layer: nn.Module) -> list[Axis]:
    """The tensors and axes behind one side of a layer."""
    name, which = side
    if name == LSTM:
        return [(tensor, 1) for tensor in LSTM_INPUTS]
    if which == "in":
        return [(f"{name}.weight", 1)]
    return [(f"{name}.{tensor}", 0) for tensor, value in layer.state_dict().items() if value.ndim]


def _dependent_entries(model: Recogniser) -> networkx.Graph:
    """Entries of the layers, (side, number), with an edge between any two that go together."""
    with _without_timm():
        import torch_pruning
    probe = nn.Sequential()
    probe.add_module("cnn", copy.deepcopy(model.cnn))
    probe.add_module(LSTM, nn.Conv2d(model.rnn.input_size, 1, 1))
    probe.to(model.device, torch.float32)
    graph = torch_pruning.DependencyGraph()
    with torch.inference_mode(False), torch.enable_grad():  # It reads the autograd graph.
        graph.build_dependency(
            probe,
            torch.zeros(1, 3, HEIGHT, 32, device=model.device),
            unwrapped_parameters=[(layer.constant, 0) for layer in shortcuts_of(probe)],
        )
    names = {module: name for name, module in probe.named_modules()}
    entries = networkx.Graph()
    for layer in [m for m in graph.module2node if isinstance(m, nn.Conv2d) and names[m] != LSTM]:
        root = (names[layer], "out")
        if not all((root, entry) in entries for entry in range(layer.out_channels)):
            for target, side, found in _dependents(graph, layer):
                if target in names:
                    # Cut to one channel, a depthwise convolution looks like any other.
                    end = "out" if getattr(target, DEPTHWISE, False) else side
                    entries.add_edges_from(
                        ((root, e.root_idx), ((names[target], end), e.idx)) for e in found
                    )
    return entries


class _Entry(NamedTuple):
    """An entry of a layer, and the one of the first layer that it depends on; TP's own names."""

    idx: int
    root_idx: int


def _dependents(graph: Any, layer: nn.Conv2d) -> Iterator[tuple[Any, str, set[_Entry]]]:
    """What depends on the output channels of a layer: each layer or operation, side and entries.

    The graph's own get_pruning_group forgets that an entry depends on two, and compares every list
    of entries with every other, which takes minutes where many layers are coupled.
    """
    seen: dict[tuple[Any, Any], set[_Entry]] = defaultdict(set)
    first = {_Entry(i, i) for i in range(layer.out_channels)}
    waiting = [
        (graph.module2node[layer], graph.get_pruner_of_module(layer).prune_out_channels, first)
    ]
    while waiting:
        node, pruner, given = waiting.pop()
        entries = given - seen[node, pruner]
        if not entries:
            continue
        seen[node, pruner] |= entries
        yield node.module, "out" if graph.is_out_channel_pruning_fn(pruner) else "in", entries
        for dependency in node.dependencies:
            if dependency.is_triggered_by(pruner):
                mapped: Any = sorted(entries)
                for mapping in dependency.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                waiting.append(
                    (dependency.target, dependency.handler, {_Entry(*entry) for entry in mapped})
                )


@contextmanager
def _without_timm() -> Iterator[None]:
    """Torch-Pruning imports timm where it finds it, for nothing used here and for seconds."""
    if "timm" in sys.modules:
        yield
        return
    sys.modules["timm"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["timm"]
