"""Finds a segment of evidence: its file, or, once that is gone, its packs.

Whoever reads evidence opens segments through `open_segment` and need not know which it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.keystore import KeyStore
from capture.pack import PackedSegment
from capture.tail import SegmentReader

if TYPE_CHECKING:
    from capture.crypt import Keys
    from capture.store import Store
    from capture.uncached import Uncached

AnySegment = SegmentReader | PackedSegment


def open_segment(
    store: Store, generation: int, keys: Keys | None = None, *, uncached: Uncached | None = None
) -> AnySegment:
    """Open a segment, which the caller closes. FileNotFoundError when there is none, FormatError
    when it cannot be read.

    Without keys only its header and its commits' places can be read. `uncached` is for the file of
    a segment; see `capture.tail`.
    """
    try:
        return SegmentReader(store.segment(generation), keys, uncached=uncached)
    except FileNotFoundError:
        keystore = None if keys is None else KeyStore(store, keys)
        return PackedSegment(store, generation, keystore)
