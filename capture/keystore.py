"""Data keys of the sealed store: one for each session, wrapped by the appliance's key.

`capture.packing` makes them, readers open them, an erasure destroys them. Keys lie apart from the
ciphertext, so that a copy or an archive of packs holds none of them. See docs/evidence-format.md:

* `keys/IIIIIIII` has a slot of 64 bytes for each session of an incarnation, at its counter * 64;
  slot 0 is that of the records outside of sessions;
* `keys/segments.SSSS` has a slot for each generation whose number begins with SSSS: the wrapped key
  of a segment whose file is gone.

A slot of zeros holds no key: it was never made, or it was destroyed. Who changes a file holds its
lock, so that a key that is being destroyed is not written back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from struct import pack
from typing import TYPE_CHECKING

from capture.crypt import KEY_BYTES, WRAPPED_BYTES
from capture.frames import SESSION_BITS, incarnation_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from capture.crypt import Keys
    from capture.store import Store

SLOT = 64
_EMPTY = bytes(SLOT)
_NEAR = 64  #: slots so close together are read and written at once
_COUNTER = (1 << SESSION_BITS) - 1


class KeyStore:
    """The data keys of one store."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._folder, self._keys = store.keys, keys

    def get(self, incarnation: int, session: int) -> bytes | None:
        """Return a session's data key, None when there is none; EvidenceError when it does not
        open.

        `incarnation` is that of the segment: session 0 has a key for each.
        """
        owner, counter = _place(incarnation, session)
        slot = _read(self._folder / f"{owner:08x}", counter, 1)
        return None if slot == _EMPTY else self._unwrap(slot, owner, session)

    def ensure(self, incarnation: int, sessions: Iterable[int]) -> dict[int, bytes]:
        """Return the data keys of sessions, making those that are not there; they survive power
        loss then.
        """
        places: dict[int, list[tuple[int, int]]] = {}
        for session in sessions:
            owner, counter = _place(incarnation, session)
            places.setdefault(owner, []).append((counter, session))
        found: dict[int, bytes] = {}
        for owner, wanted in places.items():
            with _locked(self._folder / f"{owner:08x}") as fd:
                changed = [self._group(fd, owner, group, found) for group in _groups(wanted)]
                if any(changed):
                    os.fsync(fd)
        return found

    def _group(
        self, fd: int, owner: int, group: list[tuple[int, int]], found: dict[int, bytes]
    ) -> bool:
        first = group[0][0]
        length = (group[-1][0] + 1 - first) * SLOT
        slots = bytearray(os.pread(fd, length, first * SLOT).ljust(length, b"\0"))
        changed = False
        for counter, session in group:
            at = (counter - first) * SLOT
            slot = bytes(slots[at : at + SLOT])
            if slot != _EMPTY:
                found[session] = self._unwrap(slot, owner, session)
                continue
            found[session] = key = secrets.token_bytes(KEY_BYTES)
            slots[at : at + WRAPPED_BYTES] = self._keys.wrap(key, _context(owner, session))
            changed = True
        if changed:
            _write(fd, slots, first * SLOT)
        return changed

    def _unwrap(self, slot: bytes, owner: int, session: int) -> bytes:
        return self._keys.unwrap(slot[:WRAPPED_BYTES], _context(owner, session))

    def segment(self, generation: int) -> bytes | None:
        """Return the wrapped key of a segment, as its header held it; None when there is none."""
        name, number = _segment_place(generation)
        slot = _read(self._folder / name, number, 1)
        return None if slot == _EMPTY else slot[:WRAPPED_BYTES]

    def keep_segment(self, generation: int, wrapped: bytes) -> None:
        """Keep the wrapped key of a segment whose file is about to go."""
        name, number = _segment_place(generation)
        with _locked(self._folder / name) as fd:
            _write(fd, wrapped.ljust(SLOT, b"\0"), number * SLOT)
            os.fsync(fd)

    def destroy(self, session: int, generations: Iterable[int]) -> None:
        """Destroy a session's data key, and the keys of the segments that held frames of it.

        Its content cannot be read then, by nobody. The session must be in packs only.
        """
        owner, counter = _place(0, session)
        self._zero(f"{owner:08x}", [counter])
        for name, number in map(_segment_place, generations):
            self._zero(name, [number])

    def _zero(self, name: str, numbers: Iterable[int]) -> None:
        with _locked(self._folder / name) as fd:
            for number in numbers:
                _write(fd, _EMPTY, number * SLOT)
            os.fsync(fd)


def _place(incarnation: int, session: int) -> tuple[int, int]:
    """Return the incarnation whose file has the slot, and the slot's number."""
    if session == 0:
        return incarnation, 0
    return incarnation_of(session), session & _COUNTER


def _segment_place(generation: int) -> tuple[str, int]:
    """Return the file that has a generation's slot, and the slot's number in it."""
    return f"segments.{generation >> 16:04x}", generation & 0xFFFF


def _context(owner: int, session: int) -> bytes:
    return b"narrows session key\0" + pack("<IQ", owner, session)


def _groups(wanted: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    group: list[tuple[int, int]] = []
    for counter, session in sorted(wanted):
        if group and counter - group[-1][0] > _NEAR:
            yield group
            group = []
        group.append((counter, session))
    if group:
        yield group


def _read(path: Path, number: int, count: int) -> bytes:
    content = b""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.pread(fd, count * SLOT, number * SLOT)
        finally:
            os.close(fd)
    return content.ljust(count * SLOT, b"\0")


def _write(fd: int, content: bytes | bytearray, offset: int) -> None:
    if os.pwrite(fd, content, offset) != len(content):
        raise OSError(28, "short write of a key")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)
