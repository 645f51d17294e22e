"""A state directory with real evidence in it, written by the real writer, and an independent walk.

Sessions are scripted: a list of bytes and records in the order in which a gate writes them.
"""

import time
from contextlib import contextmanager

from capture.crypt import Keys
from capture.frames import Kind, walk
from capture.index import Index
from capture.index_fill import fill
from capture.records import (
    KINDS,
    TYPES,
    Attributed,
    Detected,
    Operation,
    Result,
    SessionClose,
    SessionOpen,
    decode,
)
from capture.segment import SegmentWriter
from capture.settings import WriterSettings
from capture.store import Store
from capture.tail import SegmentReader

SETTINGS = WriterSettings(
    chunk_bytes=1 << 20, chunk_count=3, segment_bytes=4 << 20, commit_s=0.0, reserve_bytes=0
)
OWNER = {
    "host": "narrows-client", "pid": 4242, "uid": 1000, "exe": "/usr/bin/psql",
    "exe_sha256": "ab" * 32, "argv": ["psql", "-h", "db"], "cgroup": "/clients/ci-deployer/1",
}  # fmt: skip


class Evidence:
    """A store under `path`, its keys, and writers on it."""

    def __init__(self, path):
        self.store = Store(path / "state", path / "run")
        self.store.prepare()
        self.keys = Keys.load_or_create(self.store.state)

    @contextmanager
    def writer(self, stream="gate-0", settings=SETTINGS):
        writer = SegmentWriter(
            self.store, self.keys, stream, role="gate", settings=settings, wake=lambda: None
        )
        try:
            yield Gate(writer)
        finally:
            writer.close()

    @contextmanager
    def index(self):
        with Index.open(self.store.index) as index:
            fill(index, self.store, self.keys)
            yield index

    def frames(self):
        """Every frame on disk: (generation, session, kind, time, offset, payload), by `walk`."""
        for generation in self.store.generations():
            with SegmentReader(self.store.segment(generation), self.keys) as reader:
                for commit in reader.commits():
                    plaintext = reader.plaintext(commit)
                    for kind, session, at, offset, body, _ in walk(
                        plaintext, reader.header.incarnation
                    ):
                        yield generation, session, kind, at, offset, bytes(body)

    def told(self, session):
        """Every record of a session, as (type name, fields)."""
        return [
            (TYPES[kind].__name__, decode(kind, body))
            for _, number, kind, _, _, body in self.frames()
            if number == session and kind in TYPES
        ]


class Gate:
    """What a gate worker does with its writer, as far as evidence goes."""

    def __init__(self, writer):
        self.writer = writer
        self.sent = {}

    def record(self, session, record):
        return self.writer.record(session, record, time.time_ns())

    def data(self, session, kind, content):
        key = (session, kind)
        at = self.sent.get(key, 0)
        for start in range(0, len(content), 4096):
            piece = content[start : start + 4096]
            area = self.writer.reserve(len(piece))
            while area is None:
                time.sleep(0.001)
                area = self.writer.reserve(len(piece))
            assert len(area) >= len(piece)
            area[: len(piece)] = piece
            self.writer.publish(kind, session, at, len(piece), time.time_ns())
            at += len(piece)
        self.sent[key] = at

    def up(self, session, content):
        self.data(session, Kind.UP, content)

    def down(self, session, content):
        self.data(session, Kind.DOWN, content)

    def open(self, account="ci-deployer", protocol="opaque", owner=OWNER, target="198.51.100.10"):
        session = self.writer.new_session()
        self.record(
            session,
            SessionOpen("192.0.2.10", 40000 + session % 20000, target, 5432, "everything",
                        "write", "client", 0),
        )  # fmt: skip
        if account is None:
            self.record(session, Attributed(None, "none", "none", "no-sensor"))
        else:
            self.record(session, Attributed(account, "kernel", "syn", owner=owner))
        self.record(session, Detected(protocol))
        return session

    def ask(self, session, op, text, result=None, **more):
        """One operation and its result."""
        verb = text.split(" ", 1)[0].upper() or "unknown"
        offset = self.sent.get((session, Kind.UP), 0)
        self.record(session, Operation(op, verb, text, offset, len(text), **more))
        self.up(session, text.encode() + b"\0")
        self.down(session, b"row" * 5)
        if result is not None:
            self.record(session, result)

    def select(self, session, op, text, rows=1, **more):
        self.ask(session, op, text, Result(op, "ok", f"SELECT {rows}", rows, 15, 1000), **more)

    def close(self, session, operations=0, reason="fin", by="client"):
        up = self.sent.get((session, Kind.UP), 0)
        down = self.sent.get((session, Kind.DOWN), 0)
        self.record(session, SessionClose(reason, by, up, down, operations, 0))

    def commit(self):
        self.writer.wait_durable()


def kinds(*types):
    return {KINDS[kind] for kind in types}
