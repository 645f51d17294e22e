"""nftables messages as trees of attributes, over pyroute2's netlink socket.

`appliance.proxy.redirect.nft` and its neighbours give the numbers their names. pyroute2 carries the
messages; what is inside is encoded here, because its own nftables attributes want integers where
libnftables wants names, decode some flags to nothing and know no counters. What is sent and what
the kernel gives back are the same tree, so that the two can be compared attribute by attribute
(`agrees`). Formats: linux/netlink.h, linux/netfilter/nfnetlink.h. Every call opens a socket in the
calling thread's network namespace and closes it.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.nftables.main import NFTables

if TYPE_CHECKING:
    from collections.abc import Iterable

#: An attribute is (type, value); a value is bytes, or attributes again.
Tree = tuple[tuple[int, "bytes | Tree"], ...]
#: What is asked of the kernel: message number, flags, attributes.
Message = tuple[int, int, Tree]

INET = 1
BATCH_BEGIN, BATCH_END = 0x10, 0x11
RETRIES = 5
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_HEADER = 20  # nlmsghdr and nfgenmsg
_KINDS = 64
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_LARGEST = 64 << 20  # a limit, not what is taken


class RawMessage(nfgen_msg):  # type: ignore[misc]  # pyroute2 has no types
    """An nftables message whose attributes stay bytes."""

    nla_map = ()

    def __init__(self, data: Any = None, offset: int = 0, **options: Any) -> None:
        super().__init__(data, offset, **options)
        self.attributes = b""

    def encode(self) -> None:
        """Put header and attributes into `data`."""
        super().encode()
        self.data += self.attributes
        self.length = self["header"]["length"] = len(self.data)
        struct.pack_into("=I", self.data, 0, self.length)

    def decode(self) -> None:
        """Take the attributes out of `data`."""
        super().decode()
        self.attributes = bytes(self.data[self.offset + _HEADER : self.offset + self.length])


def encode(tree: Tree) -> bytes:
    """Return the attributes as the kernel reads them, each padded to four bytes."""
    parts = []
    for kind, value in tree:
        nested = not isinstance(value, bytes)
        data = encode(value) if not isinstance(value, bytes) else value
        number = kind | _NESTED if nested else kind
        parts.append(struct.pack("=HH", len(data) + 4, number) + data + bytes(-len(data) % 4))
    return b"".join(parts)


def parse(data: bytes) -> list[tuple[int, bytes]]:
    """Return the attributes of one level; the flags in their types are dropped."""
    found = []
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found.append((kind & _TYPE_MASK, data[at + 4 : at + length]))
        at += (length + 3) & ~3
    return found


def first(data: bytes, *path: int) -> bytes | None:
    """Return the value of the first attribute at `path`; None when there is none."""
    for kind in path:
        value = next((value for number, value in parse(data) if number == kind), None)
        if value is None:
            return None
        data = value
    return data


def agrees(wanted: Tree, data: bytes) -> bool:
    """Say whether `data` has every wanted attribute with its value, and no more or fewer of the
    same type.

    The kernel adds attributes of its own (counts, handles, defaults): those are not looked at.
    """
    present = parse(data)
    for kind in dict(wanted):
        values = [value for number, value in wanted if number == kind]
        others = [value for number, value in present if number == kind]
        if len(values) != len(others):
            return False
        for value, other in zip(values, others, strict=True):
            if value != other if isinstance(value, bytes) else not agrees(value, other):
                return False
    return True


def text(value: str) -> bytes:
    """Return a string attribute."""
    return value.encode() + b"\0"


def be32(value: int) -> bytes:
    """Return a number attribute."""
    return struct.pack(">I", value & 0xFFFFFFFF)


def transact(messages: Iterable[Message]) -> None:
    """Send (message, flags, attributes) as one transaction: all of it or nothing.

    It is one system call, so that no death of this process can leave a part. Raises NetlinkError
    when the kernel refuses.
    """
    batch = [
        _edge(BATCH_BEGIN),
        *(
            _message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, tree)
            for kind, flags, tree in messages
        ),
        _edge(BATCH_END),
    ]
    with _socket() as sock:
        sock.nlm_request_batch(batch)


def dump(kind: int, tree: Tree = ()) -> list[bytes]:
    """Return the attributes of each object that a dump gives; nothing when the table or set is not
    there.
    """
    return _ask(kind, NLM_F_REQUEST | NLM_F_DUMP, tree)


def get(kind: int, tree: Tree) -> list[bytes]:
    """Return the attributes of one object, in a list; nothing when it is not there."""
    return _ask(kind, NLM_F_REQUEST | NLM_F_ACK, tree)


def _ask(kind: int, flags: int, tree: Tree) -> list[bytes]:
    for attempt in range(RETRIES):
        try:
            with _socket() as sock:
                number = NFNL_SUBSYS_NFTABLES << 8 | kind
                answers = sock.nlm_request(_message(kind, flags, tree), number, flags)
                return [answer.attributes for answer in answers if isinstance(answer, RawMessage)]
        except NetlinkDumpInterrupted:
            if attempt == RETRIES - 1:
                raise
        except NetlinkError as refused:
            if refused.code == errno.ENOENT:
                return []
            raise
    raise AssertionError


def enlarge(sock: Any) -> None:
    """Let a netlink socket take a transaction, and the answers to it, of any size that is sane.

    The limits of the system (net.core.wmem_max) would refuse some thousand networks.
    """
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, option, _LARGEST)


def _socket() -> Any:
    sock = NFTables(nfgen_family=INET)
    enlarge(sock)
    sock.asyncore.status["nlm_generator"] = False
    sock.asyncore.register_policy(
        {NFNL_SUBSYS_NFTABLES << 8 | n: RawMessage for n in range(_KINDS)}
    )
    return sock


def _message(kind: int, flags: int, tree: Tree) -> RawMessage:
    message = RawMessage()
    message["nfgen_family"] = INET
    message["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | kind
    message["header"]["flags"] = flags
    message.attributes = encode(tree)
    return message


def _edge(number: int) -> RawMessage:
    message = RawMessage()
    message["res_id"] = NFNL_SUBSYS_NFTABLES
    message["header"]["type"] = number
    message["header"]["flags"] = NLM_F_REQUEST
    return message
