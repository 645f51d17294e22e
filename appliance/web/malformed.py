"""One connection: answers what is no HTTP as everything else that is wrong is answered.

aiohttp's own answer would be a text that repeats what came, and a trace in the log for each: work
and disk that anybody could take, without a token.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiohttp import web

from appliance.web.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.web_request import BaseRequest

log = logging.getLogger("narrows.review")

#: Sent with every answer.
HEADERS = {
    "Strict-Transport-Security": "max-age=31536000",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "narrows",
}


class Protocol(web.RequestHandler):
    """One connection; the only answers of its own are to what is no request."""

    def __init__(self, server: web.Server, refused: Callable[..., bool], **bounds: Any) -> None:
        super().__init__(server, **bounds)
        self._refused = refused  #: told the status of each such answer and the peer; says whether
        #: it may go to the log
        self.gone = bounds["loop"].create_future()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Say so to who waits for it."""
        super().connection_lost(exc)
        if not self.gone.done():
            self.gone.set_result(None)

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:  # fmt: skip
        """Answer and close; ConnectionError when the answer has begun."""
        del message
        if request.writer.output_size > 0:
            raise ConnectionError("the answer is cut")
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            problem = Problem("bad-request", "it is no HTTP/1.1, or its head is too long")
            if self._refused(str(problem.status), request.remote or "unknown"):
                log.info("%s: no HTTP from %s", problem.reference, request.remote)
        else:
            problem = Problem("internal", "it is in the log under this reference")
            self._refused(str(problem.status), request.remote or "unknown")
            log.error("%s: from %s", problem.reference, request.remote, exc_info=exc)
        response = problem.response()
        response.headers.update(HEADERS)
        response.force_close()
        return response
