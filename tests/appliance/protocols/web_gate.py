"""A gate that real HTTP clients can reach: the real driver behind a loopback port."""

import socket
import threading

from driven import Gate, records

from appliance.proxy.session import Session
from appliance.proxy.upstream import prepare
from capture.records import Attributed, SessionOpen


class WebGate:
    """Relays every connection to `port` to one server; `close` returns what was recorded."""

    def __init__(self, folder, upstream, **route):
        self._gate = Gate(folder, **route)
        self._gate.worker._started = True  # the evidence's thread may wake it
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.sessions = []
        self._gate.loop.add_reader(self._listener.fileno(), self._accept)
        self._thread = threading.Thread(target=self._gate.loop.run_forever, daemon=True)
        self._thread.start()

    def _accept(self):
        near, peer = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._upstream))
        for sock in (near, far):
            sock.setblocking(False)
            prepare(sock)
        worker, route = self._gate.worker, self._gate.config.route[0]
        number = worker.writer.new_session()
        target = ("127.0.0.1", 80)
        opened = SessionOpen(*peer, *target, "all", route.durability, "client", 0)
        worker.record(number, opened, worker.now())
        session = Session(worker, number, route, peer, target, near, far, worker.now())
        worker.sessions[number] = session
        session.connected = True
        session.attribute(Attributed(None, "none", "none", "no-sensor"), [])
        session.down.watch()
        self.sessions.append(session)

    def call(self, function, *arguments):
        """Call in the gate's own thread, and wait for it."""
        done = threading.Event()

        def run():
            function(*arguments)
            done.set()

        self._gate.loop.call_soon_threadsafe(run)
        assert done.wait(20)

    def kill(self, session):
        self.call(self._gate.worker.kill, session.number, "uid:0(root)", "a test")

    def close(self):
        """Stop, and return the frames of the evidence."""
        self.call(self._gate.loop.remove_reader, self._listener.fileno())
        self._gate.loop.call_soon_threadsafe(self._gate.loop.stop)
        self._thread.join(20)
        self._listener.close()
        return self._gate.close()


def of(frames, session, kind):
    """Return a session's records of one type."""
    return [record for record in records(frames, session.number) if record["record"] == kind]
