"""Responses that the gate gives itself when a request or its answer cannot be passed on."""

from __future__ import annotations

_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


def tag(status: int) -> str:
    """Return status and reason as a status line has them."""
    return f"{status} {_REASONS[status]}"


def answer(status: int, message: str, verb: str) -> bytes:
    """Return a whole response to a request with method `verb`, after which the connection ends.

    `message` is what the user of the client reads: why, and the reference.
    """
    body = message.encode() + b"\n"
    head = (
        f"HTTP/1.1 {tag(status)}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if verb == "HEAD" else body)
