"""Runs the review API in a thread and asks it with the standard library's HTTP client."""

import asyncio
import http.client
import json
import socket
import ssl
import threading
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from review_evidence import Evidence

from appliance.config import Config, Paths, Review
from appliance.web.server import Server
from appliance.web.tokens import Role, Tokens, make
from capture import index_query
from capture.records import KINDS, Access


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        assert self.headers["Content-Type"].split(";")[0].endswith("json"), self.headers.items()
        return json.loads(self.body)

    def problem(self):
        assert self.headers["Content-Type"] == "application/problem+json", self.body[:200]
        told = self.json()
        assert told["status"] == self.status
        return told["type"].removeprefix("urn:narrows:problem:")


class Api:
    """The API over one state directory; `evidence` writes there."""

    def __init__(self, path, settings=None):
        self.evidence = Evidence(path)
        paths = Paths(path / "state", path / "run")
        self.config = Config(paths=paths, review=replace(Review(), port=0))
        self.tokens = {}
        kept = Tokens(paths.state)
        for role in Role:
            text, token = make(role, f"the-{role.value}")
            kept.add(token)
            self.tokens[role.value] = text
        self.kept = kept

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        self.stop()
        self._end()

    def _end(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self):
        async def make_server():
            server = Server(self.config, self.evidence.store, self.evidence.keys)
            try:
                await server.start()
            except BaseException:
                await server.stop()
                raise
            return server

        self.server = self._run(make_server())
        self.port = self.server.port
        self.tls = ssl.create_default_context(cafile=self.config.paths.state / "review.crt")

    def stop(self):
        self._run(self.server.stop())

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def connection(self):
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self.tls)

    def raw(self):
        """A TLS socket to the API."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.tls.wrap_socket(sock, server_hostname="127.0.0.1")

    def ask(self, method, path, role="admin", *, headers=None, body=None, **query):
        given = dict(headers or {})
        if role is not None:
            given["Authorization"] = f"Bearer {self.tokens.get(role, role)}"
        if query:
            path += "?" + urlencode(query)
        connection = self.connection()
        try:
            connection.request(method, "/api/v1" + path, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def get(self, path, role="admin", *, headers=None, **query):
        return self.ask("GET", path, role, headers=headers, **query)

    def post(self, path, body, role="admin"):
        headers = {"Content-Type": "application/json"}
        return self.ask("POST", path, role, headers=headers, body=json.dumps(body))

    def ok(self, path, role="admin", **query):
        answer = self.get(path, role, **query)
        assert answer.status == 200, answer.body
        return answer.json()

    def pages(self, path, **query):
        """Every item of a list, page by page."""
        cursor = None
        while True:
            more = {} if cursor is None else {"cursor": cursor}
            page = self.ok(path, **query, **more)
            yield page["items"]
            cursor = page["next"]
            if cursor is None:
                return

    def reads(self):
        """Every Access record: (who, action, sessions, outcome, query)."""
        with self.evidence.index() as index:
            return [
                (f["actor"].split(")")[0].split("(")[-1], f["action"], f["objects"], f["outcome"],
                 f["query"])
                for f in (e.fields for e in index_query.events(index, KINDS[Access]))
            ]  # fmt: skip
