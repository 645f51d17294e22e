"""What the segments say of sessions and their owners, and a server to talk to."""

import subprocess
from contextlib import contextmanager

from short_lives import program
from staging import end

from capture.follow import Follower
from capture.frames import FIRST_RECORD, walk
from capture.records import decode

PORT = 7000


@contextmanager
def echo(stage, port=PORT):
    """A server that sends everything back, on both address families."""
    argv = [program(), "echo", str(port)]
    process = stage.spawn("server", argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        end(process)


class Sessions:
    """Records of a gate by session, read from its segments; `more` reads on."""

    def __init__(self, stage):
        self._follower = Follower(stage.store, stage.keys)
        self._records = {}

    def more(self):
        while found := self._follower.step():
            for followed in found:
                for kind, session, *_, payload, _ in walk(followed.plaintext, followed.incarnation):
                    if kind >= FIRST_RECORD:
                        record = decode(kind, payload)
                        kept = self._records.setdefault(session, {})
                        kept.setdefault(record["record"], []).append(record)
        return self

    def opened(self, port=PORT):
        """Return {client port: {record name: records}} of the sessions to `port`."""
        return {
            records["SessionOpen"][0]["client_port"]: records
            for records in self._records.values()
            if "SessionOpen" in records and records["SessionOpen"][0]["target_port"] == port
        }

    def from_port(self, client_port, port=PORT):
        """Return the sessions from a client port to `port`, oldest first."""
        found = [
            records["SessionOpen"][0] | {"records": records}
            for records in self._records.values()
            if "SessionOpen" in records
        ]
        return [
            opened["records"]
            for opened in found
            if (opened["client_port"], opened["target_port"]) == (client_port, port)
        ]

    def closed(self, port=PORT):
        """Return how many sessions to `port` have ended."""
        return sum("SessionClose" in records for records in self.opened(port).values())

    def all(self, name):
        """Return every record of a type."""
        return [record for records in self._records.values() for record in records.get(name, [])]
