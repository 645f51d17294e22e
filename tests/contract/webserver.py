"""Real HTTP servers for tests and recordings: nginx, and one whose answers nginx does not give."""

import contextlib
import re
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from pgserver import free_port

#: Planted wherever a credential can stand; none of them may be found anywhere.
TOKEN = "tok-Zx81.planted_in-authorization"
PASSWORD = "hunter2-planted-in-basic"
COOKIE = "c00kie-planted-by-client"
SESSION = "s3ssion-planted-by-server"
API_KEY = "k3y-planted-in-x-api-key"
QUERY = "q-planted-in-a-query"

_CONFIGURATION = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error;
events {{ worker_connections 256; }}
http {{
  access_log {folder}/access combined buffer=4k flush=1s;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/1; uwsgi_temp_path {folder}/2; scgi_temp_path {folder}/3;
  log_format asked '$request|$status|$body_bytes_sent|$request_length|$bytes_sent';
  server {{
    listen 127.0.0.1:{port}; listen 127.0.0.1:{h2_port} http2; root {folder}/www;
    client_max_body_size 64m;
    access_log {folder}/asked asked;
    keepalive_requests 100000;
    location / {{ add_header Set-Cookie "sid={session}; Path=/; HttpOnly"; }}
    location /echo {{ return 200 "$request_method $request_uri\\n"; }}
    location /moved {{ return 302 "/echo?access_token={query}&page=2"; }}
    location /kept {{ dav_methods PUT DELETE; create_full_put_path on; }}
    location /small {{ client_max_body_size 10; proxy_pass http://127.0.0.1:9; }}
    location /gzip {{ alias {folder}/www; gzip on; gzip_types *; gzip_min_length 1; }}
  }}
}}
"""


class Nginx:
    """An nginx on a loopback port, with its files in memory; `asked` is its log."""

    def __init__(self):
        self.port = free_port()
        self.h2_port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="nginx-", dir="/dev/shm"))
        self.www = self.folder / "www"
        self.www.mkdir()
        (self.www / "index.html").write_text("hello\n", encoding="ascii")
        (self.www / "page.txt").write_text("0123456789\n" * 300, encoding="ascii")
        text = _CONFIGURATION.format(
            folder=self.folder, port=self.port, h2_port=self.h2_port, session=SESSION, query=QUERY
        )
        (self.folder / "nginx.conf").write_text(text, encoding="ascii")
        self._process = None

    def __enter__(self):
        argv = ["nginx", "-p", self.folder, "-c", self.folder / "nginx.conf"]
        self.folder.chmod(0o755)
        with (self.folder / "output").open("wb") as output:
            self._process = subprocess.Popen(argv, stdout=output, stderr=output)
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return self
            assert time.monotonic() < until, (self.folder / "output").read_text()
            assert self._process.poll() is None, (self.folder / "output").read_text()
            time.sleep(0.02)

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def asked(self):
        """Return (request line, status, body bytes, request bytes, response bytes) as logged."""
        lines = (self.folder / "asked").read_text(encoding="ascii").splitlines()
        return [
            (line, int(status), int(body), int(request), int(response))
            for line, status, body, request, response in (row.split("|") for row in lines)
        ]


class _Answers(socketserver.StreamRequestHandler):
    """Reads requests without a body and answers by path, in ways that nginx does not."""

    def handle(self):
        while True:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = self.rfile.readline()
                if not line:
                    return
                head += line
            method, path = re.match(rb"(\S+) (\S+)", head).groups()
            name = "connect" if method == b"CONNECT" else path.decode().strip("/")
            if getattr(self, f"do_{name}")(head) is not None:
                return

    def do_trailers(self, _head):
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, Set-Cookie\r\n\r\n"
            b"5\r\nhello\r\n6;note=x\r\n world\r\n0\r\nX-Sum: 42\r\nSet-Cookie: sid="
            + SESSION.encode() + b"\r\n\r\n"
        )  # fmt: skip

    def do_hints(self, _head):
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n")
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def do_endless(self, _head):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end")
        return True

    def do_silent(self, _head):
        self.request.recv(1)
        return True

    def do_socket(self, head):
        """A WebSocket that says everything back, in frames that nobody here looks into."""
        assert b"Sec-WebSocket-Key" in head
        self.wfile.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
        )
        while data := self.request.recv(4096):
            self.wfile.write(data)
        return True

    def do_connect(self, head):
        if b"forbidden" in head:
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            return None
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        while data := self.request.recv(4096):
            self.wfile.write(data[::-1])
        return True


@contextlib.contextmanager
def answers():
    """Yield the port of a server that answers every `do_` of `_Answers`."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Answers) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
