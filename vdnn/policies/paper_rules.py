"""When to release and when to fetch, as the vDNN paper does it (§III): both streams meet at every layer's end.

    forward    the copy of layer n's X starts with the layer; at the end of its last consumer it is released
    backward   before layer m, `find_prefetch_layer` picks one layer, whose copy runs beside m; both streams
               are joined at the end of m, which is where the next layer's backward begins

A layer is a module call without module calls inside that saves something; one that saves nothing has no
moment in backward that an engine could see. Differences to the paper that PyTorch forces: the copy of a
feature map with several consumers starts with the first of them, not the last (autograd packs it there), and
is released at the end of the last, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vdnn.analysis.moments import Points
from vdnn.policies.candidates import Saved
from vdnn.policies.plans import covers_half
from vdnn.values.plan import Offload
from vdnn.values.trace import Trace

__all__ = ["PaperLayer", "feature_inputs", "find_prefetch_layer", "paper_actions"]


@dataclass(slots=True)
class PaperLayer:
    """One layer, in forward order. Its X is offloaded here if this is the last layer that consumes it."""

    conv: bool
    offloaded: bool
    prefetched: bool = False


def find_prefetch_layer(current: int, layers: Sequence[PaperLayer]) -> int:
    """The layer whose X to fetch during the backward of layer `current`, marked as fetched; -1 for none.

    The search goes towards the input and ends at the next CONV layer, so that nothing is fetched long before
    it is used (paper, findPrefetchLayer).
    """
    for candidate in range(current - 1, -1, -1):
        layer = layers[candidate]
        if layer.offloaded and not layer.prefetched:
            layer.prefetched = True
            return candidate
        if layer.conv:
            return -1
    return -1


def feature_inputs(trace: Trace, kinds: Sequence[str]) -> dict[int, int]:
    """The X of every layer of these kinds: storage → the last module call of such a kind that consumes it.

    X is what the layer saves and did not make itself: a pool's indices are not.
    """
    found: dict[int, int] = {}
    for t in trace.saved:
        if t.module >= 0 and trace.modules[t.module].kind in kinds:
            call = trace.modules[t.module]
            if trace.storages[t.storage].alloc < call.forward_begin:
                found[t.storage] = max(found.get(t.storage, -1), t.module)
    return found


def paper_actions(trace: Trace, items: Sequence[Saved], consumers: dict[int, int]) -> dict[int, Offload]:
    """What to do with each of these storages; `consumers` says for each the layer whose X it is, the last one."""
    points = Points(trace)
    first_unpack: dict[int, tuple[tuple[int, int], int]] = {}
    for i, t in enumerate(trace.saved):
        moment = points.unpack(i)
        if t.module >= 0 and moment is not None:
            first_unpack[t.module] = min(first_unpack.get(t.module, (moment, i)), (moment, i))
    parents = {call.parent for call in trace.modules}
    calls = sorted(call for call in first_unpack if call not in parents)
    place = {call: i for i, call in enumerate(calls)}
    layers = [PaperLayer(trace.modules[call].kind == "conv", False) for call in calls]
    # a layer that backward does not ask anything of has no place: what it consumes comes back on demand
    owner = {place[consumers[i.storage]]: i.storage for i in items if consumers[i.storage] in place}
    for layer in owner:
        layers[layer].offloaded = True
    prefetch: dict[int, str] = {}
    wait: dict[int, str] = {}
    for current in range(len(layers) - 1, -1, -1):
        chosen = find_prefetch_layer(current, layers)
        if chosen < 0:
            continue
        # a POOL whose own X was offloaded does not yet hold the X of the CONV below beside it: the paper's peaks
        # under `all` say so, while those under `conv` have both. The copy runs beside the layer after the POOL.
        start = current - (trace.modules[calls[current]].kind == "pool" and layers[current].offloaded)
        if start > chosen:
            prefetch[owner[chosen]] = _unpack(points, first_unpack[calls[start]][1])
            if start - 1 > chosen:
                wait[owner[chosen]] = _unpack(points, first_unpack[calls[start - 1]][1])
    return {
        item.storage: Offload(
            _release(trace, points, item, consumers[item.storage]),
            prefetch.get(item.storage, ""),
            wait.get(item.storage, ""),
            covers_half(trace, item.storage, item.tensors),
        )
        for item in items
    }


def _unpack(points: Points, saved: int) -> str:
    return f"unpack {points.names[saved]}"


def _release(trace: Trace, points: Points, item: Saved, consumer: int) -> str:
    """The end of the last call that packs it; in a plain network, of its last consumer."""
    last = max([consumer, *(trace.saved[i].module for i in item.tensors)], key=points.end)
    return f"end {trace.modules[last].fqn}#{trace.modules[last].call}"
