"""How a segment writer uses memory and disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WriterSettings:
    """Sizes in bytes, times in seconds. One writer uses chunk_bytes * chunk_count of memory."""

    chunk_bytes: int = 4 << 20
    chunk_count: int = 6
    segment_bytes: int = 256 << 20
    commit_s: float = 0.05
    reserve_bytes: int = 32 << 20  #: held back for an orderly stop on a full disk; 0 for none
    ahead: bool = True  #: preallocate the next segment before it is needed


#: For a command line that writes a few records and ends.
SMALL = WriterSettings(
    chunk_bytes=1 << 20,
    chunk_count=1,
    segment_bytes=2 << 20,
    commit_s=0.0,
    reserve_bytes=0,
    ahead=False,
)
