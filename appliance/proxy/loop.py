"""What the data path asks of an event loop: five calls that uvloop and asyncio both offer.

Sockets on the byte path are raw and non-blocking; no transports and no streams. Another loop fits
by offering these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer(Protocol):
    """What `call_later` returns."""

    def cancel(self) -> None:
        """Do not call."""
        ...


class Loop(Protocol):
    """An event loop, as far as the data path needs one."""

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> Any:
        """Call `callback` whenever `fd` is readable."""
        ...

    def remove_reader(self, fd: Any) -> Any:
        """Stop; harmless when there is no reader."""
        ...

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> Any:
        """Call `callback` whenever `fd` is writable."""
        ...

    def remove_writer(self, fd: Any) -> Any:
        """Stop; harmless when there is no writer."""
        ...

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call once after `delay` seconds."""
        ...

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any) -> Any:
        """Call soon, from another thread."""
        ...
