"""The keys that open the evidence, and the slots of `evidence/keys` that hold them wrapped."""

import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from second_ledger import Broken

SLOT = 64
SESSION_BITS = 40


def opened(key, nonce, sealed, associated, what):
    """Return the plaintext of AES-256-GCM, or raise Broken with `what`."""
    try:
        return AESGCM(key).decrypt(nonce, sealed, associated)
    except InvalidTag:
        raise Broken(f"{what}: does not authenticate") from None


def key_file(path):
    """Return the 32 bytes of a key file of 64 hex digits."""
    return bytes.fromhex(path.read_text("ascii"))


def key_id(appliance_key):
    """Return the 8 bytes by which a segment names the appliance key."""
    return sha256(b"narrows key id\0" + appliance_key).digest()[:8]


def commitment(data_key):
    """Return the key commitment of a segment's header."""
    return sha256(b"narrows key commitment\0" + data_key).digest()


def part_keys(data_key, salt, session, generation, first):
    """Return (key, key commitment) of a part."""
    info = b"narrows sealed part\0" + salt + struct.pack("<QII", session, generation, first)
    out = HKDFExpand(hashes.SHA256(), 64, info).derive(data_key)
    return out[:32], out[32:]


def segment_place(generation):
    """Return (file in `evidence/keys`, slot) of a segment's wrapped key."""
    return f"segments.{generation >> 16:04x}", generation & 0xFFFF


@dataclass(frozen=True, slots=True)
class KeySlots:
    """The folder `evidence/keys` and the appliance key that opens what is in it."""

    folder: Path
    appliance_key: bytes

    def slot(self, name, number):
        """Return the 64 bytes of a slot; zeros where the file has none."""
        path = self.folder / name
        if not path.exists():
            return bytes(SLOT)
        with path.open("rb") as file:
            file.seek(SLOT * number)
            return file.read(SLOT).ljust(SLOT, b"\0")

    def segment_wrapped(self, generation):
        """Return the 60 bytes of a segment's wrapped key, or None when it was destroyed."""
        slot = self.slot(*segment_place(generation))
        return slot[:60] if any(slot) else None

    def session_key(self, session, incarnation):
        """Return the data key of a session (0: of none, by that writer); None if destroyed."""
        owner = session >> SESSION_BITS if session else incarnation
        slot = self.slot(f"{owner:08x}", session & ((1 << SESSION_BITS) - 1))
        if not any(slot):
            return None
        associated = b"narrows session key\0" + struct.pack("<IQ", owner, session)
        what = f"key of session {session:016x}"
        return opened(self.appliance_key, slot[:12], slot[12:60], associated, what)
