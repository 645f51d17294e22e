"""Keys of the appliance: the key-encryption key, the digest key, and a data key for each segment.

Used by the segment writer and by readers. Key files are 32 bytes as hex in files of mode 0600; a
file that others may read is refused. The key-encryption key may come as a systemd credential
instead (LoadCredentialEncrypted=narrows.appliance-key), so that it never lies beside the evidence.
No key appears in a repr, a log or an error.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import struct
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from capture.errors import EvidenceError, KeyFileError

KEY_BYTES = 32
CREDENTIAL = "narrows.appliance-key"
WRAPPED_BYTES = 12 + KEY_BYTES + 16
LEAST_HIDDEN_BYTES = 8  #: of what is shorter, a digest says too much to who has its key
_PLACE = struct.Struct("<QQ")


class Secret:
    """Bytes that must not be shown; `reveal` is the only way to them."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """Return the bytes themselves."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"


def read_key(path: Path) -> Secret:
    """Return the key of a 0600 file of 64 hex digits; KeyFileError otherwise."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid not in {0, os.geteuid()}:
            raise KeyFileError(f"{path} belongs to another user ({found.st_uid})")
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077:
            raise KeyFileError(f"{path} may be read by others (mode {mode:o}); chmod 600 it")
        text = file.read(1024)
    try:
        key = bytes.fromhex(text.decode("ascii").strip())
    except ValueError as wrong:
        raise KeyFileError(f"{path} is no hexadecimal key") from wrong
    if len(key) != KEY_BYTES:
        raise KeyFileError(f"{path} holds {len(key)} bytes, not {KEY_BYTES}")
    return Secret(key)


def create_key(path: Path) -> Secret:
    """Return the key in `path`, making a random one if there is none; safe against two at once."""
    if not path.exists():
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, secrets.token_hex(KEY_BYTES).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(scratch, path)
        except FileExistsError:
            pass
        finally:
            scratch.unlink()
        _sync(path.parent)  # a key that power loss takes away takes the evidence with it
    return read_key(path)


def credential() -> Path | None:
    """Return the file with the key-encryption key that systemd gave this process, if it did; see
    systemd.exec(5), "Credentials".
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, CREDENTIAL) if folder else None
    return path if path is not None and path.exists() else None


def _given(state: Path) -> Secret | None:
    """Return the key-encryption key that systemd gave; KeyFileError when `state` has another."""
    path = credential()
    if path is None:
        return None
    key, beside = read_key(path), state / "appliance.key"
    if beside.exists() and read_key(beside).reveal() != key.reveal():
        raise KeyFileError(f"the credential {CREDENTIAL} and {beside} are different keys")
    return key


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Keys:
    """The appliance's keys, as far as evidence needs them."""

    __slots__ = ("_digest", "_hidden", "_wrapping", "key_id")

    def __init__(self, wrapping: Secret, digest: Secret) -> None:
        self._wrapping = wrapping
        self._digest = digest
        self._hidden = hashlib.sha256(b"narrows hidden bytes\0" + digest.reveal()).digest()
        self.key_id = hashlib.sha256(b"narrows key id\0" + wrapping.reveal()).digest()[:8]

    @classmethod
    def load_or_create(cls, state: Path) -> Keys:
        """Return the keys of a state directory, making them on the first start."""
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        wrapping = _given(state) or create_key(state / "appliance.key")
        return cls(wrapping, create_key(state / "digest.key"))

    @classmethod
    def load(cls, state: Path) -> Keys:
        """Return the keys of a state directory; FileNotFoundError or KeyFileError when they are not
        there.
        """
        wrapping = _given(state) or read_key(state / "appliance.key")
        return cls(wrapping, read_key(state / "digest.key"))

    def __repr__(self) -> str:
        return f"Keys({self.key_id.hex()})"

    def wrap(self, data_key: bytes, context: bytes) -> bytes:
        """Return nonce + encrypted `data_key` + tag, bound to `context`; WRAPPED_BYTES long."""
        nonce = secrets.token_bytes(12)
        return nonce + AESGCM(self._wrapping.reveal()).encrypt(nonce, data_key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """Return the data key; EvidenceError when it was not wrapped by this key for this
        context.
        """
        try:
            return AESGCM(self._wrapping.reveal()).decrypt(wrapped[:12], wrapped[12:], context)
        except InvalidTag as wrong:
            raise EvidenceError("a segment's data key does not open with appliance.key") from wrong

    def digest(self, data: bytes) -> str:
        """Return the keyed digest of a whole secret: HMAC-SHA256 under digest.key, first 16 bytes,
        hex. Equal secrets have equal digests wherever they are shown: that is what it is for.
        """
        return hmac.new(self._digest.reveal(), data, hashlib.sha256).digest()[:16].hex()

    def hidden(self, session: int, side: str, offset: int, data: bytes) -> str:
        """Return the keyed digest that stands for blanked bytes at one place; empty for fewer than
        LEAST_HIDDEN_BYTES.

        It is of no use at any other place: whoever can send through the gate and read evidence
        cannot try out what others said.
        """
        if len(data) < LEAST_HIDDEN_BYTES:
            return ""
        place = _PLACE.pack(session, offset) + side.encode() + b"\0"
        return hmac.new(self._hidden, place + data, hashlib.sha256).digest()[:16].hex()


def commitment(data_key: bytes) -> bytes:
    """Return the 32-byte commitment to a data key: one ciphertext opens under one key only."""
    return hashlib.sha256(b"narrows key commitment\0" + data_key).digest()
