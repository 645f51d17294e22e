"""HTTP/1.1 responses, taken apart independently of the code under test."""

import re
from typing import NamedTuple


class Response(NamedTuple):
    """One response; `whole` when nothing of it is missing."""

    status: int
    head: bytes
    body: bytes
    whole: bool


def responses(data, verbs):
    """Yield the responses in `data` to requests with these methods, in order."""
    verbs = iter(verbs)
    at = 0
    while at < len(data):
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            yield Response(0, data[at:], b"", whole=False)
            return
        head, at = data[at : end + 4], end + 4
        status = int(head[9:12])
        if 100 <= status < 200 and status != 101:
            yield Response(status, head, b"", whole=True)
            continue
        verb = next(verbs)
        if status == 101 or (verb == "CONNECT" and status < 300):
            yield Response(status, head, data[at:], whole=True)
            return
        length, whole = _length(head, data[at:], verb, status)
        yield Response(status, head, data[at : at + length], whole)
        at += length


def _length(head, rest, verb, status):
    if verb == "HEAD" or status in {204, 304}:
        return 0, True
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked\r\n", head):
        at = 0
        while chunk := re.compile(rb"([0-9a-fA-F]+)[^\r]*\r\n").match(rest, at):
            size = int(chunk[1], 16)
            if not size:
                end = rest.find(b"\r\n\r\n", chunk.end() - 2)
                return (len(rest), False) if end < 0 else (end + 4, True)
            at = chunk.end() + size + 2
        return len(rest), False
    found = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)\r\n", head)
    if found is None:
        return len(rest), False  # until the end: it can never be known to be whole
    return min(int(found[1]), len(rest)), int(found[1]) <= len(rest)
