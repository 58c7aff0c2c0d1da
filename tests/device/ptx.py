"""Runs PTX, as NVRTC made it from the shipped source with the shipped options, on a CPU.

All threads of a grid are elements of numpy arrays. Those that stand at the smallest program counter run together up to
the next label, branch, barrier or exit; this brings diverged threads together again. Blocks run a few thousand threads
at a time. A `Fault` names the kernel and the line of PTX: accesses outside of the live allocations, misaligned or of
bytes and registers that nothing was written to, lanes missing from a shuffle, barriers that not all threads of a block
reach, and races, in shared memory between barriers and in global memory within a launch.
"""

import functools
import re

import numpy as np

from . import compile
from .instructions import ALL, DTYPES, decode
from .memory import Fault, Global, Memory, Rows

__all__ = ["Fault", "Kernel", "Memory", "kernels_of", "launch"]

TOGETHER = 2**15  # threads
WARP = 32


@functools.cache
def kernels_of(text):
    """The kernels of a module of PTX, by name."""
    parts = re.split(r"(?=\.visible \.entry )", text)[1:]
    kernels = [Kernel(part) for part in parts]
    return {kernel.name: kernel for kernel in kernels}


class Kernel:
    """A kernel: `name`, `params` (name and numpy dtype of each parameter), `max_threads` of a block, and `run`."""

    def __init__(self, text):
        head, body = text.split(")", 1)
        self.name = re.match(r"\.visible \.entry (\w+)", head)[1]
        self.params = [(m[2], DTYPES[m[1]]) for m in re.finditer(r"\.param \.(\w+).*?(\w+)\s*(?:,|$)", head, re.M)]
        bound = re.search(r"\.maxntid (\d+)", body)
        self.max_threads = int(bound[1]) if bound else 1024
        self.widths = {m[2]: DTYPES[f"b{m[1]}"] for m in re.finditer(r"\.reg \.[bfus](\d+)\s+(%\w+?)[<;]", body)}
        self.widths |= {m[1]: DTYPES["pred"] for m in re.finditer(r"\.reg \.pred\s+(%\w+?)<", body)}
        self.labels, self.sizes = {}, {"shared": 0, "local": 0}
        for m in re.finditer(r"\.(shared|local)\s+\.align (\d+) \.[bfus](\d+)\s+(\w+)(?:\[(\d+)\])?;", body):
            align, offset = int(m[2]), self.sizes[m[1]]
            self.labels[m[4]] = -(-offset // align) * align
            self.sizes[m[1]] = self.labels[m[4]] + int(m[3]) // 8 * int(m[5] or 1)

        lines, targets = [], {}
        for line in body[body.index("{") + 1 : body.rindex("}")].splitlines():
            line = line.split("//")[0].strip(" \t{}")
            if line.endswith(":"):
                targets[line[:-1]] = len(lines)
            elif line and not line.startswith("."):
                lines.append(line)
        self.joins = set(targets.values())
        self.code = [decode(line, self.labels, targets) for line in lines]

    def run(self, memory, arguments, grid, block, *, blocks=None):
        """Launch the kernel.

        Parameters
        ----------
        memory : Memory
        arguments : list of bytes
            One for each parameter; a pointer is eight bytes.
        grid : tuple of int
            Blocks along x, y and z; those left out are 1.
        block : int
            Threads of a block.
        blocks : sequence of int, optional
            Numbers of the blocks that run, by default all: (z * grid y + y) * grid x + x.

        Raises
        ------
        Fault
            As the module says.
        NotImplementedError
            At an instruction that is not known here.
        """
        sizes = [dtype.itemsize for _, dtype in self.params]
        if [len(raw) for raw in arguments] != sizes:
            raise Fault(f"{self.name}: takes arguments of {sizes} bytes, not {[len(raw) for raw in arguments]}")
        grid = (*grid, 1, 1)[:3]
        if not 0 < block <= self.max_threads or min(grid) < 1 or max(grid[1:]) > 65_535:
            raise Fault(f"{self.name}: cannot be launched with grid {grid} and block {block}")
        values = {name: np.frombuffer(raw, dtype)[0] for (name, dtype), raw in zip(self.params, arguments, strict=True)}
        seen, step = Global(memory), max(1, TOGETHER // block)
        blocks = np.arange(grid[0] * grid[1] * grid[2]) if blocks is None else np.array(blocks)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), step):
                self._run(Threads(self, blocks[first : first + step], grid, block, values=values, seen=seen))

    def _run(self, threads):
        while len(threads.who):
            if threads.waiting.all():
                self._pass_barriers(threads)
            now = int(threads.pc[~threads.waiting].min())
            chosen = (threads.pc == now) & ~threads.waiting
            which = ALL if chosen.all() else np.flatnonzero(chosen)
            while which is not None:
                which, now = self._step(threads, which, now)

    def _step(self, threads, which, now):
        """Do one instruction; the threads that go on with the next one without a look at the others, and its number."""
        instruction = self.code[now]
        some = which
        if instruction.guard:
            taken = self._guarded(lambda: threads.read(instruction.guard, DTYPES["pred"], which), instruction)
            taken = taken != instruction.unless
            some = which if taken.all() else np.arange(len(threads.who))[which][taken]
        if instruction.kind == "plain":
            if some is ALL or len(some):
                self._guarded(lambda: instruction.run(threads, some), instruction)
            if now + 1 not in self.joins:
                return which, now + 1
            threads.pc[which] = now + 1
            return None, 0
        threads.pc[which] = now + 1
        if instruction.kind == "branch":
            threads.pc[some] = instruction.target
        elif instruction.kind == "exit":
            threads.leave(some)
        elif instruction.kind == "barrier":
            threads.pc[some], threads.waiting[some] = now, True
        else:  # a shuffle takes place when all of its lanes have come
            threads.pc[some] = now
            here = np.flatnonzero(threads.pc == now)
            threads.waiting[here] = True
            ready = self._guarded(lambda: instruction.run(threads, here), instruction)
            threads.pc[ready], threads.waiting[ready] = now + 1, False
        return None, 0

    def _pass_barriers(self, threads):
        """All threads wait: they go on if those of each block wait at one barrier."""
        first = np.flatnonzero(np.diff(threads.row, prepend=-1))  # of each block
        stands, other = np.minimum.reduceat(threads.pc, first), np.maximum.reduceat(threads.pc, first)
        for at in np.unique(threads.pc):
            if self.code[at].kind == "shuffle":
                raise Fault(f"{self.name}: {self.code[at].text} lanes of a warp never come")
        if (stands != other).any():
            raise Fault(f"{self.name}: {self.code[stands.min()].text} threads of a block never come")
        for row in threads.row[first]:
            threads.shared.forget(row)
        threads.pc += 1
        threads.waiting[:] = False

    def _guarded(self, function, instruction):
        try:
            return function()
        except Fault as fault:
            raise Fault(f"{self.name}: {instruction.text} {fault}") from None


def launch(source, options, kernel, *args, grid, block, arch="compute_90"):
    """Compile CUDA C++ and run a kernel with CPU tensors, contiguous, or numpy scalars; all memory is the tensors'."""
    memory, raw = Memory(), []
    for arg in args:
        if isinstance(arg, np.generic):
            raw.append(arg.tobytes())
            continue
        assert arg.is_contiguous()
        assert not arg.is_cuda
        memory.add(arg.data_ptr(), arg.nbytes)
        raw.append(np.uint64(arg.data_ptr()).tobytes())
    kernels_of(compile.ptx(source, options, arch))[kernel].run(memory, raw, grid, block)


class Threads:
    """Threads of some blocks that have not ended: registers, program counters, and who waits."""

    def __init__(self, kernel, blocks, grid, block, *, values, seen):
        count = len(blocks) * block
        self.values, self.seen = values, seen
        self.widths = kernel.widths
        self.row, tid = np.divmod(np.arange(count), block)  # row: which of these blocks
        self.slot = np.arange(count)
        self.lane = tid % WARP
        self.warp = self.row * -(-block // WARP) + tid // WARP
        self.who = (blocks[self.row] * block + tid + 1).astype(np.uint32)
        self.pc, self.waiting = np.zeros(count, np.int64), np.zeros(count, bool)
        self.shared, self.local = Rows(len(blocks), kernel.sizes["shared"]), Rows(count, kernel.sizes["local"])
        number = blocks[self.row]
        self._registers = {
            "%tid.x": tid.astype(np.uint32),
            "%ctaid.x": (number % grid[0]).astype(np.uint32),
            "%ctaid.y": (number // grid[0] % grid[1]).astype(np.uint32),
            "%ctaid.z": (number // grid[0] // grid[1]).astype(np.uint32),
            "%ntid.x": np.full(count, block, np.uint32),
            **{f"%nctaid.{axis}": np.full(count, size, np.uint32) for axis, size in zip("xyz", grid, strict=True)},
        }
        self._partly: dict[str, np.ndarray] = {}  # which threads have written a register, where not all have

    def read(self, name, dtype, which):
        """A register's values; of a wider register the low bits."""
        values, written = self._registers.get(name), self._partly.get(name)
        if values is None or (written is not None and not written[which].all()):
            raise Fault(f"reads {name}, which was not written")
        values = values[which]
        return (values if values.itemsize == dtype.itemsize else values.astype(f"u{dtype.itemsize}")).view(dtype)

    def write(self, name, values, which):
        """Set a register; a wider one gets the values with zeros or, of signed integers, signs before them."""
        width = self.widths[name.rstrip("0123456789")]
        if values.itemsize != width.itemsize:
            if values.dtype.kind == "i" and values.itemsize < width.itemsize:
                values = values.astype(f"i{width.itemsize}")
            else:
                values = values.view(f"u{values.itemsize}").astype(width)
        values = values.view(width)
        if which is ALL:
            self._registers[name] = np.full(len(self.who), values) if values.ndim == 0 else values
            self._partly.pop(name, None)
            return
        if name not in self._registers:
            self._registers[name], self._partly[name] = np.zeros(len(self.who), width), np.zeros(len(self.who), bool)
        self._registers[name][which] = values
        if name in self._partly:
            self._partly[name][which] = True

    def leave(self, which):
        """End threads."""
        keep = np.ones(len(self.who), bool)
        keep[which] = False
        for name in ("row", "slot", "lane", "warp", "who", "pc", "waiting"):
            setattr(self, name, getattr(self, name)[keep])
        self._registers = {name: values[keep] for name, values in self._registers.items()}
        self._partly = {name: written[keep] for name, written in self._partly.items() if not written[keep].all()}
