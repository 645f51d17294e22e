"""One TLS leg by itself: what comes in any pieces is what was sent."""

import random
import socket
import ssl

import pytest

from appliance.proxy.tls.stream import SCRATCH_BYTES, TlsStream


@pytest.fixture
def legs(certificates):
    """Return two streams with TLS up, and a function that gives one what the other said, cut."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificates.server())
    server.num_tickets = 0
    client = ssl.create_default_context(cafile=certificates.ca)
    near, middle_near = socket.socketpair()
    far, middle_far = socket.socketpair()
    socks = (near, middle_near, far, middle_far)
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.setblocking(False)
    scratch = memoryview(bytearray(SCRATCH_BYTES))
    up = stream(near, client, scratch, server_hostname="up.test")
    down = stream(far, server, scratch, server_side=True)

    def passed(source, sink, length=1 << 20):
        try:
            data = source.recv(length)
        except BlockingIOError:
            return False
        sink.sendall(data)
        return True

    done = [False, False]
    while not all(done):
        done = [up.handshake(), down.handshake()]
        passed(middle_near, middle_far)
        passed(middle_far, middle_near)

    def give(length):
        return passed(middle_near, middle_far, length)

    yield up, down, give
    for sock in socks:
        sock.close()


def stream(sock, context, scratch, **words):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, **words)
    return TlsStream(sock, tls, incoming, outgoing, scratch)


def received(leg):
    found = b""
    leg.told(behind=False)
    while leg.pending:
        try:
            found += leg.recv(64 * 1024)
        except BlockingIOError:
            break
    return found


@pytest.mark.parametrize("first", [1, 5, 16_000, 16_405, 16_406, 16_407, 40_000])
def test_a_record_that_was_cut_comes_whole_with_those_behind_it(legs, first):
    up, down, give = legs
    sent = random.Random(first).randbytes(200_000)
    left, found = memoryview(sent), b""
    left = left[up.send(left) :]
    give(first)
    found += received(down)
    while len(found) < len(sent):
        if left:
            try:
                left = left[up.send(left) :]
            except BlockingIOError:
                pass
        assert give(1 << 20) or left
        found += received(down)
    assert found == sent


@pytest.mark.parametrize("seed", range(20))
def test_bytes_arrive_as_they_were_sent_however_they_are_cut(legs, seed):
    up, down, give = legs
    dice = random.Random(seed)
    sent = found = b""
    for _ in range(30):
        piece = dice.randbytes(dice.choice((1, 300, 5_000, 16_384, 40_000, 64_000)))
        sent += piece
        assert up.send(piece) == len(piece)
        while give(dice.choice((1, 17, 900, 16_400, 50_000, 1 << 20))):
            if dice.random() < 0.7:
                found += received(down)
    found += received(down)
    assert found == sent
