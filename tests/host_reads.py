"""Counts where the host waits for a device: each would hold up a GPU, and none costs anything on a CPU."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {  # to read a number, to learn how large a result is, or to send numbers
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.is_nonzero, aten.equal, aten.bincount, aten.lift_fresh,
}  # fmt: skip


class _Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen, self.operators = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        packet = function.overloadpacket
        masked = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        unsized = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in WAITING or masked or unsized:
            self.seen.append(str(packet))
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads():
    """Gives an object whose `seen` lists the operators of the block that a host would wait for."""
    with _Reads() as reads:
        yield reads
