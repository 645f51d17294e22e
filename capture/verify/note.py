"""Reads signed notes, checkpoints and verifier keys (C2SP signed-note and tlog-checkpoint)."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_ED25519 = 1


class NoteError(Exception):
    """A note, checkpoint or key is malformed, or is not signed as it must be."""


@dataclass(frozen=True, slots=True)
class LogKey:
    """A log's name and Ed25519 public key."""

    name: str
    public: bytes

    @classmethod
    def parse(cls, vkey: str) -> LogKey:
        """Return the key of "name+hash+base64(type || key)"; NoteError when it is none."""
        parts = vkey.strip().split("+", 2)
        if len(parts) != 3:
            raise NoteError("no verifier key")
        name, digest, encoded = parts
        blob = _base64(encoded)
        if len(blob) != 33 or blob[0] != _ED25519 or not name:
            raise NoteError("no Ed25519 verifier key")
        key = cls(name, blob[1:])
        if key.identity().hex() != digest:
            raise NoteError("the verifier key does not fit its own key id")
        return key

    def identity(self) -> bytes:
        """Return the key's 4-byte id."""
        return sha256(self.name.encode() + b"\n" + bytes([_ED25519]) + self.public).digest()[:4]

    def text_of(self, note: bytes) -> str:
        """Return the text that this key signed; NoteError when it did not sign, or not this."""
        head, separator, tail = note.rpartition(b"\n\n")
        if not separator or not tail.endswith(b"\n"):
            raise NoteError("no signed note")
        text = head + b"\n"
        signed = False
        for line in tail.decode("utf-8", "replace").removesuffix("\n").split("\n"):
            dash, _, rest = line.partition(" ")
            name, _, encoded = rest.partition(" ")
            if dash != "—" or not name:
                raise NoteError("a signature line is malformed")
            blob = _base64(encoded)
            if name == self.name and blob[:4] == self.identity():
                self._check(blob[4:], text)
                signed = True
        if not signed:
            raise NoteError(f"{self.name} did not sign it")
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as wrong:
            raise NoteError("the note's text is no UTF-8") from wrong

    def _check(self, signature: bytes, text: bytes) -> None:
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text)
        except InvalidSignature as wrong:
            raise NoteError(f"the signature of {self.name} is wrong") from wrong


@dataclass(frozen=True, slots=True)
class Signed:
    """A checkpoint whose signature was checked."""

    size: int
    root: bytes

    @classmethod
    def read(cls, note: bytes, key: LogKey) -> Signed:
        """Return the checkpoint in `note`; NoteError when it is none of this log."""
        lines = key.text_of(note).split("\n")
        if len(lines) < 4 or lines[-1]:
            raise NoteError("no checkpoint")
        origin, size, root = lines[:3]
        if origin != key.name:
            raise NoteError(f"it is a checkpoint of {origin!r}, not of {key.name}")
        if not size.isascii() or not size.isdigit() or (len(size) > 1 and size[0] == "0"):
            raise NoteError("the checkpoint's size is no number")
        digest = _base64(root)
        if len(digest) != 32:
            raise NoteError("the checkpoint's root is no SHA-256")
        return cls(int(size), digest)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as wrong:
        raise NoteError("no base64") from wrong
