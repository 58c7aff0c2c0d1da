"""Arrays and what is said of them as one text, which a page of its own can hold and `assets/data.js` reads."""

import base64
import json
import zlib
from typing import Any

import numpy as np

ALIGNED = 4  # bytes


class Packed:
    """Arrays, by number.

    >>> packed = Packed()
    >>> packed.add(np.arange(3, dtype=np.uint16))
    0
    >>> zlib.decompress(base64.b64decode(packed.text({"n": 3})))[4:]
    b'{"n":3,"arrays":[["u2",0,3]]}   \\x00\\x00\\x01\\x00\\x02\\x00\\x00\\x00'
    """

    def __init__(self) -> None:
        self.listed: list[tuple[str, int, int]] = []
        self.bytes = bytearray()

    def add(self, array: np.ndarray) -> int:
        """Keep a flat array of uint8, uint16 or float32, and return its number."""
        kept = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        self.listed.append((kept.dtype.str[1:], len(self.bytes), kept.size))
        self.bytes += kept.tobytes()
        self.bytes += bytes(-len(self.bytes) % ALIGNED)
        return len(self.listed) - 1

    def text(self, about: dict[str, Any]) -> str:
        """All as base64 of what zlib deflated: four bytes with the length of the JSON, the JSON, the arrays."""
        said = json.dumps(about | {"arrays": self.listed}, separators=(",", ":")).encode()
        said += b" " * (-len(said) % ALIGNED)
        whole = len(said).to_bytes(4, "little") + said + self.bytes
        return base64.b64encode(zlib.compress(whole, 6)).decode()
