"""A worker's control socket over sessions of a real writer, for tests without a gate."""

import asyncio
import threading
import time

from appliance.live import ControlSocket
from capture.frames import session_name
from capture.records import Decision


class Gatekeeper:
    """A control socket of a worker, on a loop of its own, over sessions of a real writer."""

    def __init__(self, path, gate):
        self.gate, self.running, self.failed = gate, {}, ""
        self._loop = asyncio.new_event_loop()
        self._socket = ControlSocket(self, path)
        self._loop.run_until_complete(self._socket.start())
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def open(self, *words, **more):
        session = self.gate.open(*words, **more)
        self.gate.commit()
        self.running[session] = {
            "id": session_name(session), "client": ("192.0.2.10", 4), "route": "everything",
            "target": ("2001:db8::1", 5432), "protocol": "opaque", "started": time.time_ns(),
            "bytes_up": 70, "bytes_down": 80, "operations": 9, "unsent": 6,
        }  # fmt: skip
        return session_name(session)

    def list_sessions(self):
        return list(self.running.values())

    def kill(self, session, actor, reason):
        if self.running.pop(session, None) is None:
            return False
        self.gate.record(session, Decision(actor, "kill", reason, "done"))
        self.gate.close(session, 0, "killed", "gate")
        return True

    def stats(self):
        return {
            "worker": 0, "pid": 1, "open": len(self.running), "accepted": 5, "closed": 4,
            "refused": 3, "position": 100, "durable": 60, "failed": self.failed, "sensor": True,
            "stalled": 2,
        }  # fmt: skip

    def close(self):
        asyncio.run_coroutine_threadsafe(self._socket.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
