"""What is in a binary for a GPU: registers, memory and instructions of its kernels, as NVIDIA's tools tell them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

try:
    import nvidia.cu13

    TOOLS = next(folder for folder in (Path(path) / "bin" for path in nvidia.cu13.__path__) if folder.is_dir())
    HAS_TOOLS = all((TOOLS / tool).exists() for tool in ("cuobjdump", "nvdisasm"))
except (ImportError, StopIteration):
    HAS_TOOLS = False


@dataclass
class Loop:
    """Instructions from where a branch leads back to, up to the branch; of nested loops all are counted."""

    first: int
    last: int
    instructions: list[str]

    def count(self, *names):
        """How many of the instructions begin with one of the names."""
        return sum(instruction.startswith(names) for instruction in self.instructions)


@dataclass
class Code:
    """A kernel's resources (bytes, for a thread; shared ones for a block) and its instructions by address."""

    registers: int
    stack: int
    shared: int
    instructions: dict[int, str]

    @property
    def spills(self):
        """Accesses of local memory."""
        return sum(text.startswith(("LDL", "STL")) for text in self.instructions.values())

    @property
    def loops(self):
        """Every loop, by its first instruction."""
        found = {}
        for address, text in self.instructions.items():
            if (match := re.match(r"BRA\b.*?(0x[0-9a-f]+)$", text)) and (first := int(match[1], 16)) < address:
                found[first] = Loop(
                    first, address, [code for at, code in self.instructions.items() if first <= at <= address]
                )
        return sorted(found.values(), key=lambda loop: loop.first)

    @property
    def inner_loop(self):
        """The longest of the loops that hold no other."""
        inner = [
            loop
            for loop in self.loops
            if not any(loop.first <= other.first and other.last < loop.last for other in self.loops)
        ]
        return max(inner, key=lambda loop: len(loop.instructions))


def disassemble(cubin):
    """The kernels of a binary, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, listing = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, path],
                env={"PATH": str(TOOLS)},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    bodies = dict(re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", listing, re.S))
    result = {}
    for name, line in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage):
        amount = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*?)\s*;", bodies[name])
        instructions = {int(address, 16): text for address, text in lines}
        result[name] = Code(amount["REG"], amount["STACK"], amount["SHARED"], instructions)
    return result
