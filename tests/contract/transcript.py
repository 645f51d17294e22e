"""A recorded conversation: what each side of one connection sent, in order.

`tests/transcripts/PROTOCOL/NAME.txt`, made by `tests/transcripts/record.py` from real clients and
real servers. Lines:

    # anything           a remark
    secret TEXT          bytes that must not reach the evidence
    > TEXT               a piece that the client sent
    < TEXT               a piece that the server sent
    > end, < end         that side sent FIN

TEXT is printable ASCII with \\\\, \\n, \\r, \\t and \\xNN for the rest.
"""

import re
from pathlib import Path
from typing import NamedTuple

from appliance.sansio import CLIENT, UPSTREAM, Side

FOLDER = Path(__file__).parents[1] / "transcripts"
_ESCAPES = {"\\": b"\\", "n": b"\n", "r": b"\r", "t": b"\t"}
_PLAIN = {92: "\\\\", 10: "\\n", 13: "\\r", 9: "\\t"}


class Piece(NamedTuple):
    """Bytes of one side; None is its FIN."""

    side: Side
    data: bytes | None


class Transcript(NamedTuple):
    """One connection."""

    protocol: str
    name: str
    pieces: tuple[Piece, ...]
    secrets: tuple[bytes, ...]

    def sent(self, side):
        """Return everything that one side sent."""
        return b"".join(piece.data or b"" for piece in self.pieces if piece.side is side)

    @property
    def prefix(self):
        """Return what the client sent before the server said anything."""
        found = b""
        for piece in self.pieces:
            if piece.side is UPSTREAM:
                break
            found += piece.data or b""
        return found


def shown(data):
    """Return bytes as TEXT."""
    return "".join(
        _PLAIN.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}") for byte in data
    )


def unshown(text):
    """Return the bytes of TEXT."""
    parts = re.split(r"\\(x[0-9a-f]{2}|.)", text)
    found = bytearray()
    for number, part in enumerate(parts):
        if number % 2 == 0:
            found += part.encode("ascii")
        elif part[0] == "x" and len(part) == 3:
            found.append(int(part[1:], 16))
        else:
            found += _ESCAPES[part]
    return bytes(found)


def load(path):
    """Return the transcript in a file."""
    pieces, secrets = [], []
    for line in path.read_text(encoding="ascii").splitlines():
        word, _, text = line.partition(" ")
        if word == "secret":
            secrets.append(unshown(text))
        elif word in (">", "<"):
            side = CLIENT if word == ">" else UPSTREAM
            pieces.append(Piece(side, None if text == "end" else unshown(text)))
        elif word != "#":
            raise ValueError(f"{path}: {line!r}")
    return Transcript(path.parent.name, path.stem, tuple(pieces), tuple(secrets))


def save(path, pieces, secrets, remarks):
    """Write a transcript."""
    lines = [f"# {remark}" for remark in remarks]
    lines += [f"secret {shown(secret)}" for secret in secrets]
    for side, data in pieces:
        text = "end" if data is None else shown(data)
        lines.append(f"{'>' if side is CLIENT else '<'} {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def all_transcripts():
    """Return every transcript there is."""
    return [load(path) for path in sorted(FOLDER.glob("*/*.txt"))]
