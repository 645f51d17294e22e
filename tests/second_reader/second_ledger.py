"""The signed log, read as docs/evidence-format.md says: checkpoint, tiles, leaves, RFC 6962."""

import base64
import json
import struct
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TILE = 256


class Broken(Exception):
    """The evidence is not what was sealed; the text says where."""


def expect(condition, what):
    """Raise Broken with `what` unless the condition holds."""
    if not condition:
        raise Broken(what)


@dataclass(frozen=True, slots=True)
class Ledger:
    """A log whose leaves have the signed root; `leaves` are JSON objects, in order."""

    origin: str
    root: bytes
    leaves: list

    def of(self, kind):
        """Return the leaves of one type, in order."""
        return [leaf for leaf in self.leaves if leaf["type"] == kind]


def leaf_hash(data):
    """Return the RFC 6962 hash of a leaf."""
    return sha256(b"\0" + data).digest()


def node_hash(left, right):
    """Return the RFC 6962 hash of a node."""
    return sha256(b"\1" + left + right).digest()


def root_of(hashes):
    """Return the RFC 6962 root over leaf hashes."""
    if not hashes:
        return sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    half = 1
    while half * 2 < len(hashes):
        half *= 2
    return node_hash(root_of(hashes[:half]), root_of(hashes[half:]))


def checkpoint(folder, verifier):
    """Return (origin, number of leaves, root) of a checkpoint that the verifier key signed."""
    text, _, signatures = (folder / "checkpoint").read_text("utf-8").partition("\n\n")
    text += "\n"
    origin, size, root = text.splitlines()[:3]
    name, key_id, key = verifier.strip().split("+", 2)
    key_id, key = bytes.fromhex(key_id), base64.b64decode(key, validate=True)
    expect(key[0] == 1, "verifier key: not Ed25519")
    expect(name == origin, "checkpoint: of another log")
    expect(sha256(name.encode() + b"\n" + key).digest()[:4] == key_id, "verifier key: its id")
    for line in signatures.splitlines():
        dash, signer, value = line.split(" ")
        value = base64.b64decode(value, validate=True)
        if (dash, signer, value[:4]) == ("—", name, key_id):
            try:
                Ed25519PublicKey.from_public_bytes(key[1:]).verify(value[4:], text.encode())
            except InvalidSignature:
                raise Broken("checkpoint: signature") from None
            return origin, int(size), base64.b64decode(root, validate=True)
    raise Broken("checkpoint: not signed by this key")


def tile_name(number):
    """Return N of a tile's path: 1234067 is x001/x234/067."""
    groups = [f"{number % 1000:03d}"]
    while number := number // 1000:
        groups.insert(0, f"x{number % 1000:03d}")
    return "/".join(groups)


def tiles(folder, level, count):
    """Yield (bytes, how many entries) of the tiles that hold `count` entries of a level."""
    for number in range(-(-count // TILE)):
        width = min(TILE, count - number * TILE)
        name = tile_name(number) + (f".p/{width}" if width < TILE else "")
        path = folder / "tile" / str(level) / name
        expect(path.is_file(), f"tile {level}/{name}: missing")
        yield path.read_bytes(), width


def entries(folder, size):
    """Return the data of all leaves."""
    found = []
    for data, width in tiles(folder, "entries", size):
        at = 0
        for _ in range(width):
            (length,) = struct.unpack_from(">H", data, at)
            found.append(data[at + 2 : at + 2 + length])
            at += 2 + length
        expect(at == len(data), "entries tile: length")
    return found


def check_hash_tiles(folder, hashes):
    """Compare every hash tile with the leaves' hashes, level by level."""
    level = 0
    while hashes:
        stored = b"".join(data for data, _ in tiles(folder, level, len(hashes)))
        expect(stored == b"".join(hashes), f"tile of level {level}: other hashes")
        full = range(0, len(hashes) - len(hashes) % TILE, TILE)
        hashes = [root_of(hashes[at : at + TILE]) for at in full]
        level += 1


def read_ledger(folder, verifier):
    """Return the Ledger below `folder`, checked against the verifier key's text."""
    origin, size, root = checkpoint(folder, verifier)
    data = entries(folder, size)
    hashes = [leaf_hash(entry) for entry in data]
    expect(root_of(hashes) == root, "leaves: not those of the signed root")
    check_hash_tiles(folder, hashes)
    return Ledger(origin, root, [json.loads(entry) for entry in data])
