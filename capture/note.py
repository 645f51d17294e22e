"""Signed notes and checkpoints: the text forms of C2SP signed-note and tlog-checkpoint, with
Ed25519.

    <text, ending in a newline>
    <empty line>
    — <key name> <base64 of 4-byte key id || signature>

The ledger signs with it. The verifier has its own reading of the same specifications.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from capture.errors import EvidenceError, FormatError

ED25519 = 1
_DASH = "— "


def key_id(name: str, public: bytes) -> bytes:
    """Return the 4-byte id of an Ed25519 note key."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([ED25519]) + public).digest()[:4]


@dataclass(frozen=True, slots=True)
class NoteVerifier:
    """A named public key."""

    name: str
    public: bytes

    @classmethod
    def parse(cls, vkey: str) -> NoteVerifier:
        """Return the key of a vkey line, "name+hash+base64(type || key)"; FormatError when it is
        none.
        """
        try:
            name, digest, encoded = vkey.strip().split("+", 2)
            blob = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error) as wrong:
            raise FormatError("this is no verifier key line") from wrong
        if len(blob) != 33 or blob[0] != ED25519 or key_id(name, blob[1:]).hex() != digest:
            raise FormatError("the verifier key line does not fit its own key id")
        return cls(name, blob[1:])

    def vkey(self) -> str:
        """Return the vkey line, without a newline."""
        encoded = base64.b64encode(bytes([ED25519]) + self.public).decode()
        return f"{self.name}+{key_id(self.name, self.public).hex()}+{encoded}"

    def open(self, note: bytes) -> str:
        """Return the text of a note that this key signed; EvidenceError otherwise."""
        try:
            text, signatures = note.decode("utf-8").rsplit("\n\n", 1)
        except ValueError as wrong:
            raise FormatError("this is no signed note") from wrong
        text += "\n"
        for line in signatures.splitlines():
            name, _, encoded = line.removeprefix(_DASH).partition(" ")
            try:
                blob = base64.b64decode(encoded, validate=True)
            except binascii.Error as wrong:
                raise FormatError("a signature line is no base64") from wrong
            if name != self.name or blob[:4] != key_id(self.name, self.public):
                continue
            try:
                Ed25519PublicKey.from_public_bytes(self.public).verify(blob[4:], text.encode())
            except InvalidSignature as wrong:
                raise EvidenceError(f"the signature of {self.name} is wrong") from wrong
            return text
        raise EvidenceError(f"{self.name} did not sign this note")


class NoteSigner:
    """A named private key."""

    __slots__ = ("_key", "_prefix", "verifier")

    def __init__(self, name: str, seed: bytes) -> None:
        if not name or any(letter.isspace() or letter == "+" for letter in name):
            raise ValueError("a key name has no spaces and no plus")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        public = self._key.public_key().public_bytes_raw()
        self.verifier = NoteVerifier(name, public)
        self._prefix = key_id(name, public)

    def __repr__(self) -> str:
        return f"NoteSigner({self.verifier.name})"

    def sign(self, text: str) -> bytes:
        """Return the signed note of `text`, which ends in a newline."""
        encoded = base64.b64encode(self._prefix + self._key.sign(text.encode())).decode()
        return f"{text}\n{_DASH}{self.verifier.name} {encoded}\n".encode()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Size and root of a log at one moment."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the checkpoint's note text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Return the checkpoint of a note text; extension lines are ignored. FormatError when it is
        none.
        """
        try:
            origin, size, root, *_extensions = text.split("\n")
            hashed = base64.b64decode(root, validate=True)
        except ValueError as wrong:
            raise FormatError("this is no checkpoint") from wrong
        number = size.isascii() and size.isdigit() and (size == "0" or size[0] != "0")
        if len(hashed) != 32 or not origin or not number:
            raise FormatError("this is no checkpoint")
        return cls(origin, int(size), hashed)
