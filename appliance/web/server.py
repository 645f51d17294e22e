"""The review API's server: TLS, who may ask what, the record of every read, errors, bounds.

The way of a request: token (401, 429), parameters (400), role (403, recorded), Access record (503
when it cannot be made durable), handler. Whatever goes wrong ends in a problem object with a
reference; what nobody thought of is logged under it with its trace.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web

from appliance.web import (
    certificate,
    happened,
    health,
    openapi,
    parameters,
    proofs,
    running,
    sessions,
    streams,
)
from appliance.web.connections import IDLE_S
from appliance.web.malformed import HEADERS, Protocol
from appliance.web.problem import Problem, from_body, of_http
from appliance.web.review import Review
from appliance.web.routes import JSON, Asked, Nothing, Route
from capture import plainjson
from capture.errors import EvidenceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from appliance.config import Config
    from appliance.web.tokens import Token
    from capture.crypt import Keys
    from capture.store import Store

log = logging.getLogger("narrows.review")

MOST_BODY = 64 << 10
BODY_S = 10.0
STOP_S = 5.0
BACKLOG = 128
#: What aiohttp is told of a connection. A line holds every parameter of a list at its longest.
BOUNDS: dict[str, Any] = {
    "max_line_size": 16 << 10, "max_field_size": 8 << 10, "max_headers": 64,
    "keepalive_timeout": IDLE_S, "lingering_time": 2.0, "auto_decompress": False,
    "access_log": None,
}  # fmt: skip
_BEGUN = web.RequestKey("begun", bool)  #: its answer's head was sent
_KNOWN = web.RequestKey("known", bool)  #: it came with a good token
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="narrows"'}


async def get_description(review: Review, asked: Asked, given: Nothing) -> dict[str, Any]:
    """Return this API's description, OpenAPI 3.1; needs no token."""
    del asked, given
    return review.description


ROUTES: tuple[Route, ...] = (
    *sessions.ROUTES, *streams.ROUTES, *running.ROUTES, *happened.ROUTES, *proofs.ROUTES,
    *health.ROUTES, Route("GET", "/openapi.json", None, None, get_description),
)  # fmt: skip


class Server:
    """One review process: listens from `start` to `stop`."""

    def __init__(self, config: Config, store: Store, keys: Keys) -> None:
        self._config = config
        self.review = Review(config, store, keys, openapi.document(ROUTES))
        self._runner = web.AppRunner(
            application(self.review), handle_signals=False, shutdown_timeout=STOP_S,
            handler_cancellation=True,
        )  # fmt: skip
        self._listening: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """Return the port that is listened on."""
        assert self._listening is not None, "start was called"
        port: int = self._listening.getsockname()[1]
        return port

    async def start(self) -> None:
        """Listen; KeyFileError without a certificate, OSError when the address cannot be had."""
        names = certificate.files(self._config)
        if not self._config.review.certificate:
            certificate.ensure(*names, self._config.review.address)
        tls = certificate.context(*names)
        await self._runner.setup()
        serve = self._runner.server
        assert serve is not None, "it was set up"
        loop = asyncio.get_running_loop()

        def made() -> Protocol:
            """Return what serves one connection."""
            return Protocol(serve, self.review.refused, loop=loop, **BOUNDS)

        self._listening = _listen(self._config.review.address, self._config.review.port)
        connections = self.review.connections
        self._tasks = [
            asyncio.create_task(connections.accept(self._listening, tls, made)),
            asyncio.create_task(connections.sweep()),
        ]

    async def stop(self) -> None:
        """Answer what was asked, as far as that is quick, and end."""
        self.review.stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()
        await self.review.connections.close()
        self.review.close()


def _listen(address: str, port: int) -> socket.socket:
    """Return a listening socket; OSError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.create_server((address, port), family=family, backlog=BACKLOG)
    made.settimeout(0)
    return made


def application(review: Review) -> web.Application:
    """Return the application with every route."""
    made = web.Application(
        middlewares=[partial_middleware(review)], client_max_size=MOST_BODY
    )  # fmt: skip
    for route in ROUTES:
        handler = partial(answer, review, route)
        made.router.add_route(route.method, openapi.BASE + route.path, handler)
    made.on_response_prepare.append(_secured)
    return made


def partial_middleware(review: Review) -> Any:
    """Return the middleware that turns every error into a problem object."""

    @web.middleware
    async def problems(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer, whatever happens."""
        review.connections.began(request.protocol)
        try:
            response = await handler(request)
        except Problem as problem:
            _nothing_sent(request)
            response = _told(review, request, problem)
        except web.HTTPException as wrong:
            response = _told(review, request, of_http(wrong))
        except (ConnectionError, TimeoutError):
            raise ConnectionResetError("who asked does not listen") from None
        except Exception:
            bug = Problem("internal", "it is in the log under this reference")
            log.exception("%s: %s %s", bug.reference, request.method, request.path)
            _nothing_sent(request)
            response = bug.response()
        finally:
            review.connections.ended(request.protocol)
        review.answered[str(response.status)] += 1
        return response

    return problems


async def answer(review: Review, route: Route, request: web.Request) -> web.StreamResponse:
    """Answer a request to a route."""
    asked = Asked(request, _token(review, route, request), request.remote or "unknown")
    given = await _given(route, request)
    action: str | None = getattr(given, "action", route.action)
    needs = getattr(given, "needs", route.needs)
    objects = [given.session] if hasattr(given, "session") else []
    record = partial(
        review.recorder.record, asked.actor, action or route.path, request.path_qs, objects
    )
    try:
        if needs is not None and asked.token is not None and needs not in asked.token.role.rights:
            await record("denied")
            detail = f"this needs the right {needs.value}, which {asked.token.role.value} lacks"
            raise Problem("forbidden", detail)
        if action is not None:
            await record("allowed")
    except EvidenceError as wrong:
        raise Problem("not-recorded", "make space on the disk of the state directory") from wrong
    found = await route.handler(review, asked, given)
    if isinstance(found, web.StreamResponse):
        return found
    text = await asyncio.to_thread(plainjson.dumps, found)
    response = web.Response(body=text.encode() + b"\n", content_type=JSON)
    if review.reading.stale:
        response.headers["Narrows-Index"] = "stale"
    return response


def _token(review: Review, route: Route, request: web.Request) -> Token | None:
    """Return the token of a request; Problem when a right is needed and it is none that is good."""
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    if route.needs is None:
        return None
    try:
        token = review.tokens.find(text.strip()) if scheme.lower() == "bearer" else None
    except EvidenceError as wrong:
        log.warning("%s", wrong)
        raise Problem("unavailable", "tokens cannot be checked now") from wrong
    if token is not None:
        request[_KNOWN] = True
        return token
    peer = request.remote or "unknown"
    if not review.failures.add(peer):
        wait = {"Retry-After": str(review.failures.wait_s)}
        raise Problem("too-many", "too many requests without a good token", headers=wait)
    log.warning("a request without a good token came from %s", peer)
    raise Problem("unauthenticated", "give a good bearer token", headers=_CHALLENGE)


async def _given(route: Route, request: web.Request) -> Any:
    """Return the parameters of a request."""
    kind = route.given
    sources: dict[parameters.Where, Any] = {
        "path": dict(request.match_info), "query": parameters.single(list(request.query.items())),
        "header": {name.lower(): value for name, value in request.headers.items()},
    }  # fmt: skip
    if route.method == "POST":
        if request.content_type != JSON:
            raise Problem("bad-request", f"the body is {JSON}")
        try:
            async with asyncio.timeout(BODY_S):
                body = from_body(await request.read())
        except TimeoutError as wrong:
            raise Problem("timeout", "the body does not come") from wrong
        if not isinstance(body, dict):
            raise Problem("bad-request", "the body is a JSON object")
        sources["body"] = body
    return parameters.bind(kind, sources)


def _told(review: Review, request: web.Request, problem: Problem) -> web.Response:
    if _KNOWN in request or review.strangers.add(request.remote or "unknown"):
        path = request.path[:200].encode("ascii", "backslashreplace").decode()
        log.info(
            "%s: %s %s from %s: %d %s", problem.reference, request.method, path, request.remote,
            problem.status, problem.kind,
        )  # fmt: skip
    return problem.response()


def _nothing_sent(request: web.Request) -> None:
    """Cut an answer that has begun: a second one must not be taken for the rest of the first."""
    if _BEGUN in request:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the answer is cut")


async def _secured(request: web.Request, response: web.StreamResponse) -> None:
    request[_BEGUN] = True
    response.headers.update(HEADERS)
