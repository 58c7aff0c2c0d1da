"""What the threads of a launch read and write, and what they must not: memory with a record of every access."""

import bisect
import ctypes

import numpy as np

MANY = 2**32 - 1  # in `Record.reader`: several threads, or one that requires that nobody writes; in `writer`: adders


class Fault(RuntimeError):
    """An error of the device, or what a sanitizer would report."""


class Memory:
    """The live allocations of a device, by address; the bytes are those of this process.

    Without `races` a launch is not searched for races nor for reads of what was not written, which is faster.
    """

    def __init__(self, *, races=True):
        self.races = races
        self.clear()

    def add(self, base, size, written=None):
        """Make `size` bytes at `base` accessible; `written`, bool [size], says which bytes have a value.

        Stores set elements of `written`; without it every byte counts as written. What was added at the same address
        before is replaced.
        """
        if not base or not size:
            return
        if base not in self._spans:
            bisect.insort(self._bases, base)
        data = np.frombuffer((ctypes.c_ubyte * size).from_address(base), np.uint8)
        assert written is None or (written.dtype == bool and written.shape == data.shape)
        self._spans[base] = data, written

    def clear(self):
        """Forget every allocation."""
        self._bases, self._spans = [], {}

    def span(self, address, size):
        """Base address, bytes and their marks of the allocation that holds [address, address + size)."""
        at = bisect.bisect_right(self._bases, address) - 1
        base = self._bases[at] if at >= 0 else 0
        data, written = self._spans.get(base, ((), None))
        if address + size > base + len(data):
            raise Fault(f"access of {size} bytes at {address:#x}, outside of every allocation")
        return base, data, written


class Record:
    """Bytes that many threads see, and which thread has read and written each of them.

    Threads are numbered from 1. `data` is uint8 [n], `written` bool [n] or None. With `agreeing`, several threads may
    store the same value to one address.
    """

    def __init__(self, data, written, *, agreeing):
        self.data, self.written, self.agreeing = data, written, agreeing
        self.writer, self.reader = np.zeros(len(data), np.uint32), np.zeros(len(data), np.uint32)

    def load(self, at, dtype, who, *, constant=False):
        """The elements at byte offsets `at` [m] for the threads `who` [m]; constant: nobody may ever write them."""
        each = at[:, None] + np.arange(dtype.itemsize)
        if self.written is not None and not self.written[each].all():
            raise Fault("read of uninitialised memory")
        writer, me = self.writer[each], who[:, None]
        if ((writer != 0) & (constant | (writer != me))).any():
            raise Fault(f"race: read of what {'this launch' if constant else 'another thread'} wrote")
        before = self.reader[each]
        after = np.where(((before == 0) | (before == me)) & (not constant), me, np.uint32(MANY))
        self.reader[each] = after
        self.reader[each[self.reader[each] != after]] = MANY  # several of these threads
        return self.data[each].view(dtype)[:, 0]

    def store(self, at, values, who):
        """Write `values` [m] to byte offsets `at` [m] by the threads `who` [m]."""
        each = at[:, None] + np.arange(values.itemsize)
        new = np.ascontiguousarray(values)[:, None].view(np.uint8)
        writer, reader, me = self.writer[each], self.reader[each], who[:, None]
        if ((reader != 0) & (reader != me)).any():
            raise Fault("race: write to what another thread read")
        other = (writer != 0) & (writer != me) & ((self.data[each] != new) | (not self.agreeing))
        self.data[each] = new
        self.writer[each] = me
        if self.agreeing:
            other |= self.data[each] != new
        else:
            other |= self.writer[each] != me
        if other.any():
            raise Fault("race: write to what another thread wrote")
        if self.written is not None:
            self.written[each] = True

    def add(self, at, values, who):
        """Add integers `values` [m], in any order, at byte offsets `at` [m]; others may only add there as well."""
        each = at[:, None] + np.arange(values.itemsize)
        if self.written is not None and not self.written[each].all():
            raise Fault("addition to uninitialised memory")
        writer, reader, me = self.writer[each], self.reader[each], who[:, None]
        if ((reader != 0) & (reader != me)).any() or ((writer != 0) & (writer != me) & (writer != MANY)).any():
            raise Fault("race: addition to what another thread read or wrote")
        self.writer[each] = MANY
        Plain(self.data).add(at, values, who)

    def forget(self, places):
        """Accesses of bytes `places` before now are in order with those to come: a barrier."""
        self.writer[places] = self.reader[places] = 0


class Plain:
    """As `Record`, without a record."""

    def __init__(self, data):
        self.data = data

    def load(self, at, dtype, who, *, constant=False):
        return self.data[: len(self.data) // dtype.itemsize * dtype.itemsize].view(dtype)[at // dtype.itemsize]

    def store(self, at, values, who):
        size = values.itemsize
        self.data[: len(self.data) // size * size].view(values.dtype)[at // size] = values

    def add(self, at, values, who):
        size = values.itemsize
        np.add.at(self.data[: len(self.data) // size * size].view(values.dtype), at // size, values)


class Global:
    """Global memory during one launch."""

    def __init__(self, memory):
        self._memory, self._records = memory, {}

    def _parts(self, address, size):
        """Record, base and the numbers of the accesses for every allocation that is accessed."""
        left = np.arange(len(address))
        while len(left):
            base, data, written = self._memory.span(int(address[left[0]]), size)
            record = self._records.get(base)
            if record is None:
                made = Record(data, written, agreeing=True) if self._memory.races else Plain(data)
                record = self._records[base] = made
            here = (address[left] >= base) & (address[left] <= base + len(data) - size)
            yield record, base, left[here]
            left = left[~here]

    def load(self, address, dtype, who, *, constant):
        result = np.empty(len(address), dtype)
        for record, base, part in self._parts(address, dtype.itemsize):
            at = (address[part] - np.uint64(base)).astype(np.int64)
            result[part] = record.load(at, dtype, who[part], constant=constant)
        return result

    def store(self, address, values, who):
        for record, base, part in self._parts(address, values.itemsize):
            record.store((address[part] - np.uint64(base)).astype(np.int64), values[part], who[part])

    def add(self, address, values, who):
        for record, base, part in self._parts(address, values.itemsize):
            record.add((address[part] - np.uint64(base)).astype(np.int64), values[part], who[part])


class Rows:
    """Memory of which every block, or every thread, has its own `size` bytes: shared and local memory."""

    def __init__(self, count, size):
        self.size = size
        self._record = Record(np.zeros(count * size, np.uint8), np.zeros(count * size, bool), agreeing=False)

    def _places(self, row, offset, size):
        if (outside := (offset < 0) | (offset + size > self.size)).any():
            raise Fault(f"access of {size} bytes at {int(offset[outside][0])} of {self.size}")
        return row * self.size + offset

    def load(self, row, offset, dtype, who):
        return self._record.load(self._places(row, offset, dtype.itemsize), dtype, who)

    def store(self, row, offset, values, who):
        self._record.store(self._places(row, offset, values.itemsize), values, who)

    def forget(self, row):
        self._record.forget(slice(row * self.size, (row + 1) * self.size))
