"""How a segment writer uses memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

#: A commit is cut at the first frame that ends this far after the last cut: reading a few bytes
#: back costs one commit (`capture.held`).
COMMIT_BYTES_SOFT = 1 << 20
PAGE = 4096


@dataclass(frozen=True, slots=True)
class WriterSettings:
    """Sizes in bytes, times in seconds. One writer uses chunk_bytes * chunk_count of memory.

    ValueError when the sizes do not fit each other.
    """

    chunk_bytes: int = 4 << 20
    chunk_count: int = 6
    segment_bytes: int = 256 << 20
    segment_s: float = 0.0  #: a segment is ended when it is so old; 0: only when it is full
    commit_s: float = 0.05
    reserve_bytes: int = 32 << 20  #: held back for an orderly stop on a full disk; 0 for none
    ahead: bool = True  #: preallocate the next segment before it is needed
    #: held back for readers, who must write what they read; every writer shares this one
    spare_bytes: int = 8 << 20
    spare: bool = False  #: this writer may take from it when the disk is full
    sessions: bool = True  #: this writer numbers sessions; one that does not uses up no numbers

    def __post_init__(self) -> None:
        if self.chunk_count < 2:
            raise ValueError("a writer needs two chunks: one is filled while the other is stored")
        if self.chunk_bytes % PAGE or not 16 * PAGE <= self.chunk_bytes <= 1 << 24:
            raise ValueError("a chunk is a multiple of 4096 bytes, from 64 KiB to 16 MiB")
        least = 2 * self.chunk_bytes
        if self.segment_bytes % PAGE or self.segment_bytes < least:
            raise ValueError("a segment is a multiple of 4096 bytes and takes two chunks or more")
        if self.reserve_bytes and (self.reserve_bytes % PAGE or self.reserve_bytes < least):
            raise ValueError("the space held back is none, or takes two chunks or more")


#: For a command line that writes a few records and ends.
SMALL = WriterSettings(
    chunk_bytes=512 << 10,
    chunk_count=2,
    segment_bytes=1 << 20,
    commit_s=0.0,
    reserve_bytes=0,
    ahead=False,
    spare=True,
    sessions=False,
)
