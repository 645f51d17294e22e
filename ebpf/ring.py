"""Reads a BPF ring buffer through shared memory (kernel/bpf/ringbuf.c).

The kernel maps one page with the consumer position, one with the producer position, and the data
twice in a row, so that an event never wraps. Positions are read and written with
`memoryview.cast("Q")`: one 8-byte access each. `struct.pack_into` goes byte by byte, and the
kernel, reading a torn consumer position, refuses to reserve room. The order of loads and stores is
that of x86; on arm64 the interpreter's own work between them has been enough, but nothing
guarantees it.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_BUSY = 1 << 31
_DISCARD = 1 << 30
_LENGTH = _DISCARD - 1


class Ring:
    """One ring buffer; the descriptor (readable when there are events) stays the caller's."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        page = mmap.PAGESIZE
        self.fd = fd
        self._mask = size_bytes - 1
        self._data = page
        self._consumer_page = mmap.mmap(fd, page)
        self._producer_pages = mmap.mmap(
            fd, page + 2 * size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._bytes = memoryview(self._producer_pages)
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer = self._bytes.cast("Q")
        self._heads = self._bytes.cast("I")

    def produced(self) -> int:
        """Return the position up to which events are reserved now."""
        return self._producer[0]

    def drain(
        self, use: Callable[[memoryview], object], until: int | None = None, most: int = 1 << 62
    ) -> int:
        """Call `use` with each event, at most `most`, and up to the position `until`.

        The memory is the kernel's again when `use` returns. An event that is reserved and not
        written yet ends the run. Returns how many events there were.
        """
        position, count = self._consumer[0], 0
        end = self._producer[0] if until is None else until
        while position < end and count < most:
            at = self._data + (position & self._mask)
            head = self._heads[at >> 2]
            if head & _BUSY:
                break
            length = head & _LENGTH
            if not head & _DISCARD:
                use(self._bytes[at + 8 : at + 8 + length])
                count += 1
            position += (length + 15) & ~7
            self._consumer[0] = position
        return count

    def consumed(self) -> int:
        """Return the position up to which events were read."""
        return self._consumer[0]

    def close(self) -> None:
        """Unmap the memory."""
        for view in (self._consumer, self._producer, self._heads, self._bytes):
            view.release()
        self._consumer_page.close()
        self._producer_pages.close()
