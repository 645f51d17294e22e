"""A store out of a real gate: sessions with known bytes, some in packs, some in segments."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import threading
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from second_store import read_store
from staging import wait_for

from appliance.lab.topology import SERVER4

RANDOM, TEXT, HTTP, CUT, LATE, OPEN = 7101, 7102, 80, 7103, 7104, 7105
CROWD, NOBODY = 140, 7100  # sessions that no server takes: leaves for more than one tile
MORE = b"on and on", b"without an end"  # of the open session, when all was sealed
LAST_WORDS = b"written to memory only"
SECRET = b"Basic dXNlcjpwYXNzd29yZC1vbmU="
LONGEST_SEGMENT = 4 << 20  # what is sealed of a segment in these tests; the files are preallocated


@dataclass(frozen=True, slots=True)
class RealStore:
    """A state directory as an auditor gets it, and what the appliance itself says of it.

    `said`: by port, (client's bytes, server's bytes). `events`: of `sessions export`, as ndjson.
    `hurt`: a later copy; a commit had been changed on disk before it was sealed.
    `memory`: the chunks of the writers, when the workers were killed after LAST_WORDS.
    """

    state: Path
    said: dict
    events: list
    raw: Path
    hurt: Path
    memory: Path
    listed: list


def received(sock, size):
    """Return the next `size` bytes."""
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"the peer ended after {len(data)} bytes of {size}"
        data += piece
    return bytes(data)


def passed(source, sink, data):
    """Send bytes from one side; they must arrive at the other as they are."""
    sender = threading.Thread(target=source.sendall, args=(data,))
    sender.start()
    assert received(sink, len(data)) == data
    sender.join()


class Talks:
    """Conversations through a gate; `said` has what each one said, by port."""

    def __init__(self, stage):
        self._stage = stage
        self.ends = {}
        self.said = {}

    def connected(self, port):
        """Return a client's socket as soon as a gate worker accepts it."""

        def attempt():
            with contextlib.suppress(OSError):
                return self._stage.connect(SERVER4, port)

        return wait_for(attempt, what="a gate that accepts")

    def talk(self, port, *turns):
        """Say (client's bytes, server's bytes) in turn; returns both sockets, left open."""
        with self._stage.listen(SERVER4, port) as listener:
            client = self.connected(port)
            client.sendall(turns[0][0])  # a gate may wait for the first bytes
            server, _ = listener.accept()
        self.ends[port] = client, server
        server.settimeout(20)
        assert received(server, len(turns[0][0])) == turns[0][0]
        passed(server, client, turns[0][1])
        for up, down in turns[1:]:
            passed(client, server, up)
            passed(server, client, down)
        self.said[port] = tuple(b"".join(parts) for parts in zip(*turns, strict=True))
        return client, server

    def whole(self, port, *turns):
        """The same, and end it in order, the client first."""
        client, server = self.talk(port, *turns)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.close()
        assert client.recv(1) == b""
        client.close()

    def end(self):
        """Close what is open."""
        for sock in chain.from_iterable(self.ends.values()):
            sock.close()


def request(path, body):
    """Return an HTTP request with a credential, and the answer to it."""
    asked = b"GET /%s HTTP/1.1\r\nHost: shop\r\nAuthorization: %s\r\n\r\n" % (path, SECRET)
    return asked, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def crowd():
    """Open sessions to a port where nobody listens."""
    for _ in range(CROWD):
        with contextlib.suppress(OSError):
            socket.create_connection((SERVER4, NOBODY), 20).close()


def say_all(stage, talks):
    """Have every conversation; the gate's workers are killed in one of them."""
    dice = random.Random(7)
    stage.on("client", crowd)
    talks.whole(RANDOM, (b"?", b"!"), (dice.randbytes(100_003), dice.randbytes(50_021)))
    talks.whole(TEXT, (b"hello\n" * 10_000, b"and the same to you\n" * 3_000))
    talks.whole(HTTP, request(b"one", b"abc"), request(b"two", b"defg"))
    talks.talk(CUT, (b"until it is cut", b"and this"))
    for pid in stage.pids("gate"):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: logged(stage, "recovered") == 2, what="the recovery of both workers")
    wait_for(lambda: logged(stage, "start", role="gate") == 4, what="two new workers")
    talks.whole(LATE, (b"after that", b"as if nothing had been"))
    talks.talk(OPEN, (b"this one goes on", b"and on"))


def logged(stage, kind, **fields):
    """How many records of a kind `narrows evidence log` has."""
    lines = stage.narrows("evidence", "log", "--kind", kind, "--json").stdout.splitlines()
    return sum(fields.items() <= json.loads(line)["fields"].items() for line in lines)


def all_on_disk(stage, said):
    """Return the listed sessions when every byte and every end of them is on disk."""

    def there():
        listed = stage.sessions()
        found = {int(one["target"].rpartition(":")[2]): one for one in listed}
        nobody = found.pop(NOBODY, None)
        states = dict.fromkeys(said, "closed") | {CUT: "cut", OPEN: "running"}
        whole = (
            nobody
            and found.keys() == said.keys()
            and all(
                (one["bytes_up"], one["bytes_down"]) == tuple(map(len, said[port]))
                and one["state"] == states[port]
                for port, one in found.items()
            )
        )
        return listed if whole else None

    return wait_for(there, what="all sessions on disk")


def ended(pid):
    """Whether a process has ended, though nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def seal_once(stage):
    """Stop the seal (and who would start it again), and do its work once from the command line."""
    for pid in stage.pids("supervisor"):
        os.kill(pid, signal.SIGSTOP)
    for pid in stage.pids("seal"):
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda gone=pid: ended(gone), what="the end of the seal")
    stage.narrows("evidence", "seal")


def copied(source, target):
    """Copy a file without its holes; of a segment no more than these tests seal."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        size = min(size, LONGEST_SEGMENT) if source.endswith(".seg") else size
        new.truncate(size)
        at = 0
        with contextlib.suppress(OSError):  # ENXIO: no more data
            while (at := os.lseek(old.fileno(), at, os.SEEK_DATA)) < size:
                end = min(size, os.lseek(old.fileno(), at, os.SEEK_HOLE))
                os.pwrite(new.fileno(), os.pread(old.fileno(), end - at, at), at)
                at = end


def copy_state(state, target):
    """Copy what a reader needs of a state directory."""
    (target / "evidence").mkdir(parents=True)
    for name in ("appliance.key", "digest.key", "ledger.pub"):
        shutil.copy(state / name, target / name)
    for name in ("segments", "sealed", "keys", "ledger"):
        shutil.copytree(state / "evidence" / name, target / "evidence" / name, copy_function=copied)


def hurt_commit(stage, talks, ledger):
    """Let the open session go on, change the first commit behind the sealed ones, and seal."""
    [session] = [one["id"] for one in stage.sessions() if one["state"] == "running"]
    [opened] = [leaf for leaf in ledger.of("session_open") if leaf["session"] == session]
    generation = opened["generation"]
    end = [leaf["end"] for leaf in ledger.of("segment") if leaf["generation"] == generation][-1]
    size = len(talks.said[OPEN][0])
    for more in MORE:  # two commits at least: a bad one at the very end would be one half written
        passed(*talks.ends[OPEN], more)
        size += len(more)
        wait_for(lambda size=size: stage.shown(session)["bytes_up"] == size, what="a commit")
    path = Path(stage.config.paths.state) / "evidence" / "segments" / f"{generation:08x}.seg"
    with path.open("r+b") as file:
        file.seek(end + 70)
        [byte] = file.read(1)
        file.seek(end + 70)
        file.write(bytes([byte ^ 1]))
    stage.narrows("evidence", "seal", check=False)


def last_words(stage, talks, target):
    """Say something after everything was sealed, kill the workers, and keep their memory."""
    client, server = talks.ends[OPEN]
    passed(client, server, LAST_WORDS)
    for pid in stage.pids("gate"):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda gone=pid: ended(gone), what="the end of a worker")
    shutil.copytree(Path(stage.config.paths.run) / "hot", target)


def make_store(stage, folder):
    """Return the RealStore of a stage that is up."""
    talks = Talks(stage)
    try:
        say_all(stage, talks)
        listed = all_on_disk(stage, talks.said)
        events = stage.narrows("sessions", "export", "--all", "--format", "ndjson").stdout
        raw = folder / "raw"
        stage.narrows("sessions", "export", "--all", "--format", "raw", "--output", str(raw))
        seal_once(stage)
        copy_state(Path(stage.config.paths.state), folder / "state")
        hurt_commit(stage, talks, read_store(folder / "state").ledger)
        copy_state(Path(stage.config.paths.state), folder / "hurt")
        last_words(stage, talks, folder / "hot")
    finally:
        talks.end()
    lines = [json.loads(line) for line in events.splitlines()]
    hurt, memory = folder / "hurt", folder / "hot"
    return RealStore(folder / "state", talks.said, lines, raw, hurt, memory, listed)
