"""Secrets that tests plant, every form in which one may turn up again, and where to look."""

import base64
import hashlib
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from capture.errors import FormatError
from capture.frames import walk
from capture.records import TYPES
from capture.segments import open_segment

_BLOCK = 1 << 20
_EMPTY = bytes(_BLOCK)


def secret(name):
    """Return a secret of letters and digits; as it is one word, it would be one word of the index
    too.
    """
    return "Zq" + hashlib.sha256(name.encode()).hexdigest()[:22].swapcase()


def needles(text):
    """Return {how: bytes} of every form of a secret that is searched for, all in lower case."""
    raw = text.encode()
    found = {
        "raw": raw, "hex": raw.hex().encode(), "URL": quote(text, safe="").encode(),
        "URL, every byte": "".join(f"%{byte:02x}" for byte in raw).encode(),
        "UTF-16LE": text.encode("utf-16-le"), "UTF-16BE": text.encode("utf-16-be"),
        "escapes": "".join(f"\\x{byte:02x}" for byte in raw).encode(),
    }  # fmt: skip
    for shift in range(3):
        # letters of base64 that hang on the secret alone, whatever stands before and behind it
        coded = base64.b64encode(bytes(shift) + raw + bytes(2))
        first, last = -(-shift * 8 // 6), (shift + len(raw)) * 8 // 6
        found[f"base64 + {shift}"] = coded[first:last]
    return {how: form.lower() for how, form in found.items()}


@dataclass(frozen=True)
class Place:
    """Something that was written or answered: a file, an export, a page of the API."""

    name: str
    content: bytes


def leaks(places, planted):
    """Return [(place, secret's name, form)] of everything that turned up."""
    wanted = [(n, how, form) for n, text in planted.items() for how, form in needles(text).items()]
    found = []
    for place in places:
        content = place.content.lower()
        found += [(place.name, name, how) for name, how, form in wanted if form in content]
    return found


def files(*folders, without=()):
    """Yield every file under some folders, as it is on disk or in memory, without empty blocks."""
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and path not in without:
                try:
                    yield Place(str(path), _content(path))
                except FileNotFoundError:
                    continue  # a segment that was recycled meanwhile


def _content(path):
    found = []
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if block != _EMPTY[: len(block)]:
                found.append(block)
    return b"".join(found)


def plaintexts(store, keys, generations):
    """Yield what every commit of some segments holds, decrypted, wherever they are now."""
    for generation in generations:
        with open_segment(store, generation, keys) as reader:
            for commit in reader.commits():
                try:
                    plaintext = reader.plaintext(commit)
                except FormatError:
                    break  # being written now
                name = f"segment {generation:08x}, commit {commit.number}"
                yield Place(name, plaintext)
                half = {}
                for kind, session, _, _, body, _ in walk(plaintext, reader.header.incarnation):
                    if kind not in TYPES:  # a secret may stand across two frames
                        half[session, kind] = half.get((session, kind), b"") + bytes(body)
                for (session, kind), content in half.items():
                    yield Place(f"{name}, session {session:x}, kind {kind}", content)


def index_words(path):
    """Yield the tables of the search index, and the words that can be searched for."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        names = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        for (name,) in names:
            if not name.startswith("search"):
                rows = db.execute(f"SELECT * FROM {name}").fetchall()
                yield Place(f"index, table {name}", json.dumps(rows, default=str).encode())
    memory = sqlite3.connect(":memory:")
    try:
        memory.execute("ATTACH ? AS kept", (str(path),))
        memory.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab('kept', 'search', 'row')")
        words = " ".join(row[0] for row in memory.execute("SELECT term FROM words"))
        yield Place("index, words", words.encode())
    finally:
        memory.close()
