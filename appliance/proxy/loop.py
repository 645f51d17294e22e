"""The gate's event loop: asyncio's own, with the byte path's sockets beside it on one epoll.

A session's sockets are raw and non-blocking; no transports and no streams. Their handlers are
called straight from `select`, with the event mask and nothing else: what asyncio does per callback
costs more than a small message does. Everything else (timers, listeners, the control socket, the
sensor's socket, the writer thread's calls) is plain asyncio on the same loop, in the same thread.

Order within one turn: handlers of session sockets first, then asyncio's callbacks. Handlers must
not `watch` a descriptor that was opened within the same turn: its number may be that of one that
was closed within it, and an event of the closed one may still be in hand. Sessions are made by
asyncio's callbacks only, so that cannot happen.
"""

from __future__ import annotations

import asyncio
import select
import selectors
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
#: The socket is dead: reset, or timed out.
DEAD = select.EPOLLERR
#: Both of its directions are ended.
ENDED = select.EPOLLHUP
#: Nothing but bytes and space: no end, no urgent mark.
PLAIN = READ | WRITE
_END, _MARK, _EDGE = select.EPOLLRDHUP, select.EPOLLPRI, select.EPOLLET
EVERYTHING = READ | WRITE | _END | _MARK | _EDGE

MOST_EVENTS = 256


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """Do not call."""
        ...


class Sockets(selectors.BaseSelector):
    """Two epolls: asyncio's, and one for handlers that asyncio knows nothing of, which holds the
    first.
    """

    def __init__(self) -> None:
        self._control = selectors.EpollSelector()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._soon: dict[int, None] = {}
        self._epoll.register(self._control.fileno(), READ)

    def watch(self, fd: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever something is new: bytes, space, an end, a mark, or the
        socket's death. What is there already counts as new.
        """
        self._handlers[fd] = handler
        self._epoll.register(fd, EVERYTHING)

    def again(self, fd: int) -> None:
        """Tell once more of what is there now."""
        self._epoll.modify(fd, EVERYTHING)

    def soon(self, fd: int) -> None:
        """Call the handler without an event in the next turn: what it is to read was taken from the
        socket already (TLS).
        """
        self._soon[fd] = None

    def rename(self, fd: int, handler: Callable[[int], None]) -> None:
        """Give a watched descriptor another handler."""
        self._handlers[fd] = handler

    def drop(self, fd: int) -> None:
        """Watch a descriptor no more that is closed now: closing takes it out of the epoll."""
        self._soon.pop(fd, None)
        del self._handlers[fd]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Call the handlers of what happened; return what asyncio has to do."""
        wait = -1.0 if timeout is None else max(timeout, 0.0)
        handlers = self._handlers
        if self._soon:
            wait = 0.0
            self._call_soon()
        mine = 0
        for fd, mask in self._epoll.poll(wait, MOST_EVENTS):
            handler = handlers.get(fd)
            if handler is not None:
                handler(mask)
            else:
                mine = 1
        return self._control.select(0) if mine else []

    def _call_soon(self) -> None:
        soon, self._soon = self._soon, {}
        for fd in soon:
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(0)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """For asyncio."""
        return self._control.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """For asyncio."""
        return self._control.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """For asyncio."""
        return self._control.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """For asyncio."""
        return self._control.get_map()

    def close(self) -> None:
        """Close both epolls."""
        self._epoll.close()
        self._control.close()


class GateLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on `sockets`."""

    def __init__(self) -> None:
        self.sockets = Sockets()
        super().__init__(self.sockets)
