"""A TLS connection with a socket's methods, so that a direction need not know what it reads.

Decrypted bytes land where the caller says, which is the evidence. Theory of operation: ciphertext
goes through two memory BIOs. `recv_into` takes no more ciphertext from the socket than fits the
caller's area when decrypted; what is decrypted, or could be, and was not asked for shows in
`pending`, for the socket will not become readable because of it. `send` claims a piece of plaintext
only once its last byte of ciphertext was taken by the socket; until then the caller has to come
back with the same bytes, which is what a direction does anyway.

Non-blocking only. Errors are OSError as a socket's are: a broken TLS stream is EPROTO.
"""

from __future__ import annotations

import contextlib
import errno
import ssl
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

#: Plaintext of one send. It is encrypted, and ciphertext is decrypted, in pieces:
#: a memory BIO never gives back what it once grew to, and an idle session would keep all of it.
SEND_BYTES = 64 * 1024
PIECE_BYTES = 32 * 1024
#: A peer that makes TLS answer it (key updates, refused renegotiations) and takes no answer is
#: given up above this.
MOST_UNSENT_BYTES = 2 * SEND_BYTES
_MOST_PIECES = 64  #: of one system call; the kernel's limit is 1,024
SCRATCH_BYTES = 256 * 1024
#: Least ciphertext to take from the socket: one record, or it could never be decrypted.
LEAST_BYTES = 17 * 1024


class TlsStream:
    """One leg. `other` is the session's other leg when that is TLS, too."""

    __slots__ = (
        "_behind", "_cut", "_dry", "_early", "_ended", "_failed", "_incoming", "_more",
        "_outgoing", "_owed", "_raw", "_said_end", "_scratch", "_tls", "_told_end", "_waiting",
        "other", "truncated",
    )  # fmt: skip

    def __init__(
        self, raw: socket.SocketType, tls: ssl.SSLObject, incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO, scratch: memoryview,
    ) -> None:  # fmt: skip
        """`scratch` may be shared by all streams of a thread."""
        self._raw = raw
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._scratch = scratch
        self._early = bytearray()  #: decrypted before it was asked for
        self._waiting: list[bytes | memoryview] = []  #: ciphertext that the socket has not taken
        self._owed = 0  #: plaintext whose ciphertext is not sent to its end
        #: the socket may have more; an end or a mark is behind the bytes that it has
        self._more, self._behind = True, False
        self._cut = False  #: the socket gave its end
        self._dry = False  #: what is there of the next record is not all of it
        self._ended = self._said_end = self._told_end = False
        self._failed = ""  #: what broke it, in OpenSSL's words
        self.truncated = False  #: the peer ended without saying so in TLS
        self.other: TlsStream | None = None

    @property
    def failure(self) -> str:
        """Return what broke the stream, in OpenSSL's words; "" when nothing did."""
        return self._failed.lower().replace("_", " ")

    @property
    def raw(self) -> socket.SocketType:
        """The socket."""
        return self._raw

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._raw.fileno()

    def getsockopt(self, level: int, option: int) -> int:
        """Return an option of the socket."""
        return self._raw.getsockopt(level, option)

    # -- the handshake

    def feed(self, data: bytes) -> None:
        """Take ciphertext that was received already."""
        self._incoming.write(data)

    def handshake(self) -> bool:
        """Go on with the handshake; return whether it is done. Raises ssl.SSLError, OSError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._push()
                try:
                    self._fetch(LEAST_BYTES)
                except BlockingIOError:
                    return False
            except ssl.SSLError:
                self._push_quietly()
                raise
            else:
                self._push()
                return True

    @property
    def unsent(self) -> bool:
        """Say whether the socket has yet to take some ciphertext."""
        return bool(self._waiting or self._outgoing.pending)

    def version(self) -> str:
        """Return the protocol's version, such as "TLSv1.3"."""
        return self._tls.version() or ""

    def cipher(self) -> str:
        """Return the cipher suite's name."""
        cipher = self._tls.cipher()
        return cipher[0] if cipher else ""

    # -- receiving

    @property
    def pending(self) -> bool:
        """Say whether a call of recv may succeed without another event of the socket."""
        if self._more or self._early or self._failed or (self._ended and not self._told_end):
            return True
        return not self._dry and bool(self._incoming.pending or self._tls.pending())

    def told(self, *, behind: bool) -> None:
        """Note that the socket has something new; `behind`: more than bytes."""
        self._more = True
        self._behind = self._behind or behind

    def peek(self) -> bool:
        """Say whether recv has something, or an end, to give; a record may be none of both."""
        if self._dry or not (self._incoming.pending or self._tls.pending()):
            try:
                self._fetch(LEAST_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                return True  # recv says so itself
        area = memoryview(bytearray(LEAST_BYTES))
        length = self._decrypt(area)
        self._early += area[:length]
        return bool(self._early or self._ended or self._failed)

    def recv(self, size: int) -> bytes:
        """Return up to `size` decrypted bytes, empty at the end."""
        # The end of the shared area: what `_take` has of this call's ciphertext is no longer than
        # `size`, or than a record, and stands at its beginning.
        size = min(size, len(self._scratch) // 2)
        area = self._scratch[-size:]
        return bytes(area[: self.recv_into(area)])

    def recv_into(self, area: memoryview) -> int:
        """Fill `area` with decrypted bytes; return how many, 0 at the end."""
        if self._early:
            length = min(len(area), len(self._early))
            area[:length] = self._early[:length]
            del self._early[:length]
            return length
        length = 0 if self._dry else self._decrypt(area)
        if not length and not self._ended and not self._failed:
            length = self._receive(area)
        if length:
            return length
        if self._failed:
            raise OSError(errno.EPROTO, self._failed)
        if self._ended:
            self._told_end = True
            return 0
        raise BlockingIOError

    def _receive(self, area: memoryview) -> int:
        """Take ciphertext from the socket, and decrypt it. Raises OSError as recv does."""
        came = self._take(max(len(area), LEAST_BYTES))
        if not came:
            return self._decrypt(area)
        done = 0
        for at in range(0, len(came), PIECE_BYTES):
            self._incoming.write(came[at : at + PIECE_BYTES])
            self._dry = False
            done += self._decrypt(area[done:])
        return done

    def _fetch(self, most: int) -> None:
        """Take ciphertext from the socket, to be decrypted later. Raises OSError as recv does."""
        came = self._take(most)
        if came:
            self._incoming.write(came)

    def _take(self, most: int) -> memoryview:
        """Return ciphertext from the socket, valid until the next call of any stream."""
        room = min(max(most - self._incoming.pending, LEAST_BYTES), len(self._scratch))
        try:
            length = self._raw.recv_into(self._scratch[:room])
        except OSError:
            self._more = self._behind = False
            raise
        if length:
            self._more = self._behind or length == room
        else:
            self._incoming.write_eof()
            self._cut, self._more = True, False
        self._dry = False
        return self._scratch[:length]

    def _decrypt(self, area: memoryview) -> int:
        done, room = 0, len(area)
        read = self._tls.read
        while done < room:
            try:
                length: Any = read(room - done, area[done:])  # its length, with a buffer
            except ssl.SSLWantReadError:
                self._dry = True
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                self._end()
                break
            except ssl.SSLError as wrong:
                self._failed = str(wrong.reason or wrong)
                break
            if not length:  # how Python tells an end of either kind, mostly
                self._end()
                break
            done += length
            if not (self._incoming.pending or self._tls.pending() or self._cut):
                self._dry = True  # said here, for an exception costs more than the record did
                break
        if self._outgoing.pending:  # an alert, or the answer to a key update
            self._push_quietly()
            if sum(map(len, self._waiting)) > MOST_UNSENT_BYTES:
                self._failed = "it takes no answers to what it asks of TLS"
        return done

    def _end(self) -> None:
        """The peer sends no more. A close_notify is read before the socket's own end is asked for:
        whoever ends after that one did not say so.
        """
        self._ended = True
        self.truncated = self._cut

    # -- sending

    def send(self, data: memoryview | bytes) -> int:
        """Encrypt and send; return how many bytes of `data` are gone. BlockingIOError when none
        are: come back with the same bytes.
        """
        if not self._push():
            raise BlockingIOError
        total = len(data)
        done = min(self._owed, total)
        self._owed -= done
        if self._owed:
            return done
        while done < total:
            length = self._encrypt(data[done : done + SEND_BYTES])
            if not self._push():
                self._owed = length
                break
            done += length
        if not done and total:
            raise BlockingIOError
        return done

    def _encrypt(self, data: memoryview | bytes) -> int:
        """Encrypt all of `data`, after which there is ciphertext to push."""
        try:
            for at in range(0, len(data), PIECE_BYTES):
                self._tls.write(data[at : at + PIECE_BYTES])
                self._waiting.append(self._outgoing.read())
        except ssl.SSLError as wrong:
            raise OSError(errno.EPIPE, str(wrong.reason or wrong)) from wrong
        return len(data)

    def forget(self) -> None:
        """What was claimed to be sent again will not come again."""
        self._owed = 0

    def _push(self) -> bool:
        """Send ciphertext; return whether all is gone. Raises OSError as send does."""
        waiting = self._waiting
        if self._outgoing.pending:
            waiting.append(self._outgoing.read())
        while waiting:
            try:
                sent = self._raw.sendmsg(waiting[:_MOST_PIECES])
            except BlockingIOError:
                return False
            while waiting and sent >= len(waiting[0]):
                sent -= len(waiting.pop(0))
            if sent:
                waiting[0] = memoryview(waiting[0])[sent:]
        return True

    def _push_quietly(self) -> None:
        with contextlib.suppress(OSError):  # who receives next is told
            self._push()

    # -- ends

    def shutdown(self, how: int) -> None:
        """Say that no more comes: close_notify, unless the other side ended without one, then FIN.

        BlockingIOError when the socket takes no more now: come back.
        """
        self._say_end()
        if not self._push():
            raise BlockingIOError
        self._raw.shutdown(how)

    def _say_end(self) -> None:
        if self._said_end:
            return
        self._said_end = True
        if self.other is not None and self.other.truncated:
            return
        # OpenSSL's shutdown reads on, and takes data that it finds there for an error
        area = memoryview(bytearray(LEAST_BYTES))
        while not self._dry and not self._ended and (length := self._decrypt(area)):
            self._early += area[:length]
        with contextlib.suppress(ssl.SSLError):  # the peer's own end is not here yet
            self._tls.unwrap()

    def close(self) -> None:
        """Say the end, if there is room for it, and close the socket."""
        if not self._failed:
            self._say_end()
            self._push_quietly()
        self._raw.close()
