"""zstd for the sealed store: one frame for each part, with its size in its header.

`capture.packing` compresses, whoever reads a part decompresses. A machine that only reads may lack
the library: parts that were stored as they were can be read there, the others raise EvidenceError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.errors import EvidenceError, FormatError

try:
    import zstandard
except ImportError:  # the appliance has it; a laptop that checks a copy of its evidence may not
    zstandard = None  # type: ignore[assignment] # the module or nothing

if TYPE_CHECKING:
    from collections.abc import Callable

#: Fast enough to keep up with the gate; higher levels cost a multiple for some per cent.
LEVEL = 1


def compressor() -> Callable[[bytes], bytes] | None:
    """Return a function that compresses, for one thread; None without the library."""
    if zstandard is None:
        return None
    return zstandard.ZstdCompressor(level=LEVEL).compress


def decompress(data: bytes, size: int) -> bytes:
    """Return the `size` bytes that `data` was made of; FormatError when it was made of others."""
    if zstandard is None:
        raise EvidenceError("it is compressed, and the package zstandard is not installed")
    try:
        found = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as wrong:
        raise FormatError(f"a part does not decompress: {wrong}") from wrong
    if len(found) != size:
        raise FormatError(f"a part has {len(found)} bytes, not {size}")
    return found
