"""The way from a layer's maps back to the image: all maps in one batch, with the Deconvnet's rules."""

from typing import Any

import torch
from torch import Tensor

from qdv_gpu.deconv.nodes import children, is_relu, kind, outputs, shape
from qdv_gpu.deconv.record import Record
from qdv_gpu.deconv.rules import POINTWISE, Edge, Step, rule_of
from qdv_gpu.deconv.windows import Signal


@torch.no_grad()
def back_to_image(record: Record, which: Tensor, seed: Signal, mode: str) -> Signal:
    """Lead the signals of a layer's maps, of the images `which` [M], back to the image."""
    inner, images = set(record.nodes), len(record.images)
    consumers = {node: 0 for node in record.nodes}
    for node in record.nodes:
        for child, _ in children(node):
            if child in inner:
                consumers[child] += 1
    arriving: dict[Any, dict[int, Signal]] = {record.nodes[0]: {record.number: seed}}
    for node in record.nodes[:-1]:
        edges = [(child, number) if child in inner else None for child, number in children(node)]
        arrived = arriving.pop(node)
        signals = _by_rule(node, arrived, edges, which, images=images, consumers=consumers, mode=mode)
        if signals is None:
            signals = _autograd(node, arrived, edges, which, images)
        for edge, signal in zip(edges, signals, strict=True):
            if edge is not None and signal is not None:
                known = arriving.setdefault(edge[0], {})
                known[edge[1]] = known[edge[1]] + signal if edge[1] in known else signal
    return arriving[record.nodes[-1]][0]


def _by_rule(
    node: Any,
    arrived: dict[int, Signal],
    edges: list[Edge],
    which: Tensor,
    *,
    images: int,
    consumers: dict[Any, int],
    mode: str,
) -> list[Signal | None] | None:
    """What the node's rule sends to each of its inputs; None if it has none for batches of maps such as these."""
    rule, signal = rule_of(node), arrived.get(0)
    batched = all(one[:1] == [images] for one in (shape(node), *(shape(*edge) for edge in edges if edge)))
    if rule is None or signal is None or len(arrived) > 1 or not batched:
        return None
    follows = edges[0][0] if edges and edges[0] else None
    relu_next = follows is not None and is_relu(follows) and consumers[follows] == 1
    return rule(Step(node, signal, edges, which, mode, relu_next))


def _autograd(
    node: Any, arrived: dict[int, Signal], edges: list[Edge], which: Tensor, images: int
) -> list[Signal | None]:
    """Through any other node, by autograd's own formula for each signal, on whole tensors."""
    wanted = {position: edge for position, edge in enumerate(edges) if edge}
    M, every = len(which), torch.arange(len(which), device=which.device)
    sample = next(iter(arrived.values())).data
    gradients = []
    for number in range(outputs(node)):
        size = shape(node, number)
        gradient = sample.new_zeros(M, *size)
        if number in arrived and size[:1] == [images]:
            gradient[every, which] = arrived[number].whole(size[2:])
        elif number in arrived:
            gradient = _of_one_image(arrived[number].data, images)
        gradients.append(gradient)

    def back(*one: Tensor) -> tuple[Tensor, ...]:
        sent = node(*one)
        sent = sent if isinstance(sent, tuple) else (sent,)
        return tuple(sent[position] for position in wanted)

    results = torch.vmap(back)(*gradients)
    field = next(iter(arrived.values())).field if kind(node) in POINTWISE and len(arrived) == 1 else None
    sent: list[Signal | None] = [None] * len(edges)
    for (position, edge), result in zip(wanted.items(), results, strict=True):
        size = shape(*edge)
        summed = result.sum_to_size(M, *size)  # undoes broadcasting
        own = summed[every, which] if size[:1] == [images] else _of_one_image(summed, images)
        kept = field if size[2:] == shape(node)[2:] and len(size) == 4 else None
        sent[position] = Signal(own, None, kept)
    return sent


def _of_one_image(data: Tensor, images: int) -> Tensor:
    """What belongs to no single image, and so must come from a pass over one."""
    assert images == 1
    return data
