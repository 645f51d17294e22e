"""The real session driver between two socket pairs, with a real segment writer behind it."""

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from pgserver import free_port

from appliance import config
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
    """One worker; `connect` and `listen` stand for its transparent listeners."""

    def __init__(self, folder, **route):
        self.loop = GateLoop()
        paths = Paths(folder / "state", folder / "run")
        settings = config.Gate(listen_port=free_port())
        self.config = Config(paths, settings, route=(Route("all", **route),))
        self._listeners = []
        self.store = Store(self.config.paths.state, self.config.paths.run)
        self.store.prepare()
        self.keys = Keys.load_or_create(self.config.paths.state)
        attributor = SimpleNamespace(lost=0)  # identity is not what these tests are about
        self.worker = Worker(self.config, 0, self.loop, self.keys, attributor, set())
        writer = SegmentWriter(
            self.store, self.keys, "gate-0", role="gate", settings=SETTINGS, wake=self.worker.wake
        )
        self.worker.start(writer)

    def connect(self, port=5432):
        """Return a conversation whose both ends the test plays."""
        client, near = socket.socketpair()
        server, far = socket.socketpair()
        return Conversation(self, self.session(near, far, port), client, server)

    def listen(self, upstream):
        """Return the port of a loopback listener whose connections go to `upstream`."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        listener.setblocking(False)

        def accept():
            near, _ = listener.accept()
            self.session(near, socket.create_connection(upstream), upstream[1])

        self.loop.add_reader(listener.fileno(), accept)
        self._listeners.append(listener)
        return listener.getsockname()[1]

    def session(self, near, far, port):
        """Return a session between two sockets, as if it were accepted, attributed and dialled."""
        worker = self.worker
        for sock in (near, far):
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                prepare(sock)
        number = worker.writer.new_session()
        route, client, target = self.config.route[0], ("192.0.2.10", 40000), ("198.51.100.10", port)
        opened = SessionOpen(*client, *target, "all", route.durability, "client", 0)
        worker.record(number, opened, worker.now())
        session = Session(worker, number, route, client, target, near, far, worker.now())
        worker.sessions[number] = session
        session.connected = True
        session.attribute(Attributed(None, "none", "none", "no-sensor"), [])
        session.down.watch()
        return session

    def serve(self, function, *arguments, longest_s=60.0):
        """Call a client in a thread, and run the loop until it is done; return what it returned."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(function, *arguments)
            self.step(future.done, longest_s)
            return future.result()

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
        for listener in self.worker._listeners:
            listener.close()
        for listener in self._listeners:
            self.loop.remove_reader(listener.fileno())
            listener.close()
        self.worker.writer.close()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        return frames_of(self.store, self.keys)


class Conversation:
    """Both ends of one session."""

    def __init__(self, gate, session, client, server):
        self.gate = gate
        self.session = session
        self.client = client
        self.server = server
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
        self.server.close()


def frames_of(store, keys):
    """Return every frame that is on disk: (kind, session, offset, payload)."""
    follower = Follower(store, keys, lambda _: BEGINNING)
    frames = []
    while found := follower.step(1000):
        for each in found:
            for kind, session, _, offset, payload, _ in walk(each.plaintext, each.incarnation):
                frames.append((kind, session, offset, bytes(payload)))
    return frames


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
