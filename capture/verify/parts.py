"""Opens the parts of a pack, and puts the commits together again that they were made of."""

from __future__ import annotations

import hmac
import struct
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from capture.verify.packs import Slots

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from capture.verify.packs import Entry, Pack
    from capture.verify.segment import Commit

    #: compressed bytes, size of what they were made of
    Decompress = Callable[[bytes, int], bytes]

_CHUNK = (16 << 10) + 16
_RUN = struct.Struct("<III")
_COMMIT = struct.Struct("<4sIIIIIQQ16sQ")


class PartError(Exception):
    """A part is not what a writer wrote."""


class CannotOpen(Exception):
    """A part is compressed, and there is nothing here that decompresses."""


class Parts:
    """The content of one pack: frames by commit."""

    def __init__(
        self, evidence: Path, pack: Pack, incarnation: int, generation: int, wrapping: AESGCM,
        decompress: Decompress | None,
    ) -> None:  # fmt: skip
        """Open every part; PartError, or CannotOpen."""
        self.missing: set[int] = set()  #: sessions whose key was destroyed
        self._pieces: dict[int, list[tuple[int, memoryview]]] = {}
        self._place = (incarnation, generation)
        self._wrapping, self._decompress = wrapping, decompress
        with Slots(evidence, incarnation) as slots:
            for entry, content in pack.parts():
                wrapped, context = slots.get(entry.session)
                if wrapped:
                    data_key = self._unwrap(entry, wrapped, context)
                    self._take(self._open(pack, entry, content, data_key))
                else:
                    self.missing.add(entry.session)

    def _unwrap(self, entry: Entry, wrapped: bytes, context: bytes) -> bytes:
        try:
            return self._wrapping.decrypt(wrapped[:12], wrapped[12:], context)
        except InvalidTag as wrong:
            raise PartError(f"the key of session {entry.session:x} does not open") from wrong

    def runs(self, commit: Commit) -> list[tuple[int, memoryview]]:
        """Return a commit's frames, without those of `missing` sessions: where each run of them
        begins in its plaintext, and the run.
        """
        return sorted(self._pieces.get(commit.number, []), key=lambda piece: piece[0])

    def _open(self, pack: Pack, entry: Entry, content: bytes, data_key: bytes) -> bytes:
        info = b"narrows sealed part\0" + pack.salt
        info += struct.pack("<QII", entry.session, self._place[1], pack.first)
        key = hmac.digest(data_key, info + b"\x01", "sha256")
        commitment = hmac.digest(data_key, key + info + b"\x02", "sha256")
        if content[:32] != commitment:
            raise PartError(f"the key of session {entry.session:x} breaks its commitment")
        body = _chunks(memoryview(content)[32:], key, entry)
        if entry.method == 1:
            if self._decompress is None:
                raise CannotOpen
            try:
                body = self._decompress(body, entry.plain)
            except Exception as wrong:
                raise PartError(
                    f"the part of session {entry.session:x} does not decompress"
                ) from wrong
        if entry.method not in {0, 1} or len(body) != entry.plain:
            raise PartError(f"the part of session {entry.session:x} is malformed")
        return body

    def _take(self, plain: bytes) -> None:
        view = memoryview(plain)
        count = int.from_bytes(view[:4], "little")
        at = 4 + count * _RUN.size
        for number, start, end in _RUN.iter_unpack(view[4:at]):
            self._pieces.setdefault(number, []).append((start, view[at : at + end - start]))
            at += end - start
        if at != len(view):
            raise PartError("a part's runs do not fill it")


def _chunks(view: memoryview, key: bytes, entry: Entry) -> bytes:
    box = AESGCM(key)
    last = (len(view) - 1) // _CHUNK
    try:
        return b"".join(
            box.decrypt(
                struct.pack("<IQ", number == last, number),
                view[number * _CHUNK : (number + 1) * _CHUNK], None,
            )
            for number in range(last + 1)
        )  # fmt: skip
    except InvalidTag as wrong:
        raise PartError(f"the part of session {entry.session:x} does not authenticate") from wrong


def sealed_again(
    commit: Commit, generation: int, plaintext: bytes, box: AESGCM
) -> tuple[bytes, bytes]:
    """Return the GCM tag and the SHA-256 of the block range that a commit of `plaintext` has."""
    header = _COMMIT.pack(
        b"NCMT", generation, commit.number, int(commit.final), commit.plain, commit.size,
        commit.base, commit.time_ns, commit.previous_tag, 0,
    )  # fmt: skip
    sealed = box.encrypt(struct.pack("<IQ", generation, commit.number), plaintext, header)
    block = (header + sealed).ljust(commit.size, b"\0")
    return sealed[-16:], sha256(block).digest()
