"""The real session driver between two socket pairs, with a real segment writer behind it."""

import asyncio
import socket
import time
from types import SimpleNamespace

from appliance.config import Config, Paths, Route
from appliance.proxy.loop import GateLoop
from appliance.proxy.session import Session
from appliance.proxy.upstream import prepare
from appliance.proxy.worker import Worker
from appliance.sansio import CLIENT
from capture.crypt import Keys
from capture.follow import BEGINNING, Follower
from capture.frames import Kind, walk
from capture.records import Attributed, SessionOpen, decode
from capture.segment import SegmentWriter
from capture.settings import WriterSettings
from capture.store import Store

SETTINGS = WriterSettings(
    chunk_bytes=1 << 20, chunk_count=4, segment_bytes=8 << 20, commit_s=0.01, reserve_bytes=0
)
PATIENCE_S = 20.0


class Gate:
    """One worker without listeners; `connect` stands for an accepted connection."""

    def __init__(self, folder, **route):
        self.loop = GateLoop()
        self.config = Config(
            Paths(folder / "state", folder / "run"), route=(Route("all", **route),)
        )
        self.store = Store(self.config.paths.state, self.config.paths.run)
        self.store.prepare()
        self.keys = Keys.load_or_create(self.config.paths.state)
        attributor = SimpleNamespace(lost=0)  # identity is not what these tests are about
        self.worker = Worker(self.config, 0, self.loop, self.keys, attributor, set())
        self.worker.writer = SegmentWriter(
            self.store, self.keys, "gate-0", role="gate", settings=SETTINGS, wake=self.worker.wake
        )

    def connect(self, port=5432, upstream=None):
        """Return a conversation; without `upstream` the test plays the server, too."""
        return Conversation(self, port, upstream)

    def step(self, until, longest_s=PATIENCE_S):
        """Run the loop until `until()` is true."""
        deadline = time.monotonic() + longest_s
        while not until():
            assert time.monotonic() < deadline, "the gate did not get there"
            self.loop.run_until_complete(asyncio.sleep(0.0002))

    def close(self):
        """End everything and return every frame: (kind, session, offset, payload)."""
        for session in list(self.worker.sessions.values()):
            session.close("test", "gate", reset=True)
        self.worker.writer.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        follower = Follower(self.store, self.keys, lambda _: BEGINNING)
        frames = []
        while found := follower.step(1000):
            for followed in found:
                for kind, session, _, offset, payload, _ in walk(
                    followed.plaintext, followed.incarnation
                ):
                    frames.append((kind, session, offset, bytes(payload)))
        return frames


class Conversation:
    """Both ends of one session."""

    def __init__(self, gate, port, upstream):
        self.gate = gate
        self.client, near = socket.socketpair()
        if upstream is None:
            self.server, far = socket.socketpair()
        else:
            self.server, far = None, socket.create_connection(upstream)
        for sock in (near, far):
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                prepare(sock)
        worker = gate.worker
        number = worker.writer.new_session()
        route = gate.config.route[0]
        target = ("198.51.100.10", port)
        opened = SessionOpen("192.0.2.10", 40000, *target, "all", route.durability, "client", 0)
        worker.record(number, opened, worker.now())
        client = ("192.0.2.10", 40000)
        self.session = Session(worker, number, route, client, target, near, far, worker.now())
        worker.sessions[number] = self.session
        self.session.connected = True
        self.session.attribute(Attributed(None, "none", "none", "no-sensor"), [])
        self.session.down.watch()
        self.sent = {}

    def say(self, side, data):
        """Let one side send, and wait until the gate has received it."""
        sock = self.client if side is CLIENT else self.server
        direction = self.session.up if side is CLIENT else self.session.down
        if data is None:
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                return  # the gate closed first
            self.gate.step(lambda: direction.ended or self.session.closed)
            return
        self.sent[side] = self.sent.get(side, 0) + len(data)
        try:
            sock.sendall(data)
        except OSError:
            return  # the gate closed first
        self.gate.step(lambda: self._arrived(direction) or self.session.ending)

    def _arrived(self, direction):
        waiting = len(self.session.prefix or b"") if direction.side is CLIENT else 0
        return direction.received + waiting >= self.sent[direction.side]

    def heard(self, side):
        """Return what has arrived at one side."""
        sock = self.client if side is CLIENT else self.server
        sock.setblocking(False)
        found = bytearray()
        while True:
            try:
                data = sock.recv(1 << 20)
            except (BlockingIOError, ConnectionError):
                return bytes(found)
            if not data:
                return bytes(found)
            found += data

    def hang_up(self):
        self.client.close()
        if self.server is not None:
            self.server.close()


def half_stream(frames, session, kind):
    """Return the bytes of one half-stream as the evidence has them."""
    found = bytearray()
    for frame_kind, number, offset, payload in frames:
        if frame_kind == kind and number == session:
            assert offset == len(found)
            found += payload
    return bytes(found)


def records(frames, session):
    """Return the records of a session, in order."""
    return [
        decode(kind, payload)
        for kind, number, _, payload in frames
        if number == session and kind > Kind.DOWN_OWN
    ]
