"""Record the HTTP/1.1 transcripts again: `python tests/transcripts/record_http1.py [NAME...]`.

As `record.py`: real clients, real servers, one file a connection.
"""

import base64
import http.client
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "contract"), str(HERE)]

from record import Recorder  # noqa: E402 - the path comes first
from transcript import save  # noqa: E402 - the path comes first
from webserver import (  # noqa: E402 - the path comes first
    API_KEY,
    COOKIE,
    PASSWORD,
    QUERY,
    SESSION,
    TOKEN,
    Nginx,
    answers,
)

QUIET_S = 0.3
BASIC = base64.b64encode(f"svc-report:{PASSWORD}".encode()).decode()
SECRETS = [TOKEN, PASSWORD, BASIC, COOKIE, SESSION, API_KEY, QUERY]


def curl(*words):
    argv = ["curl", "-s", "-o", "/dev/null", "--noproxy", "*", *words]
    subprocess.run(argv, capture_output=True, check=True, timeout=20)


def spoken(port, *parts, quiet_s=QUIET_S):
    """Send parts as they are, each after the answers to the one before, then FIN."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for part in parts:
            sock.sendall(part)
            sock.settimeout(quiet_s)
            try:
                while sock.recv(65536):
                    pass
            except TimeoutError:
                pass
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(5)
        while sock.recv(65536):
            pass


def curl_session(port):
    url = f"http://127.0.0.1:{port}"
    curl("-H", f"Authorization: Bearer {TOKEN}", "-b", f"sid={COOKIE}", f"{url}/",
         "--next", "-s", "-o", "/dev/null", "-I", f"{url}/page.txt",
         "--next", "-s", "-o", "/dev/null", "-u", f"svc-report:{PASSWORD}", f"{url}/page.txt",
         "--next", "-s", "-o", "/dev/null", f"{url}/nowhere/4711",
         "--next", "-s", "-o", "/dev/null", "-r", "5-9", f"{url}/page.txt",
         "--next", "-s", "-o", "/dev/null", "-H", "If-None-Match: *", f"{url}/page.txt",
         "--next", "-s", "-o", "/dev/null", f"{url}/moved?api_key={QUERY}&page=1",
         "--next", "-s", "-o", "/dev/null", "-d", "a=1&b=2", "-H", f"X-Api-Key: {API_KEY}",
         f"{url}/echo",
         "--next", "-s", "-o", "/dev/null", "--compressed", f"{url}/gzip/page.txt",
         "--next", "-s", "-o", "/dev/null", "-X", "OPTIONS", f"{url}/")  # fmt: skip


def curl_upload(port):
    """curl asks with Expect: 100-continue before it sends chunks."""
    argv = ["curl", "-s", "-o", "/dev/null", "--noproxy", "*", "-T", "-", "-H",
            "Expect: 100-continue", f"http://127.0.0.1:{port}/kept/new"]  # fmt: skip
    subprocess.run(argv, input=b"line\n" * 2000, capture_output=True, check=True, timeout=20)


def curl_too_large(port):
    curl("-H", "Expect: 100-continue", "-d", "x" * 2000, f"http://127.0.0.1:{port}/small")


def http_client(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/echo?n=1", headers={"Authorization": f"Bearer {TOKEN}"})
    connection.getresponse().read()
    connection.request("PUT", "/kept/a", body=b"x" * 5000)
    connection.getresponse().read()
    connection.request("POST", "/echo", body=iter([b"one", b"two"]), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    connection.getresponse().read()
    connection.close()


def pipelined(port):
    """Many requests at once, as wrk with a pipelining script and some proxies send them."""
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    secret = f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
    gets = [b"GET /echo?n=%d HTTP/1.1\r\n" % n + host + secret for n in range(12)]
    post = b"PUT /kept/b HTTP/1.1\r\n" + host + b"Content-Length: 4\r\n\r\nbody"
    head = b"HEAD /page.txt HTTP/1.1\r\n" + host + b"\r\n"
    spoken(port, b"".join([*gets, post, head, *gets]), b"".join(gets[:3]))


def http_1_0(port):
    spoken(port, f"GET /echo HTTP/1.0\r\nCookie: sid={COOKIE}\r\n\r\n".encode())


def closes(port):
    spoken(port, b"GET /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")


def absolute(port):
    """A client that takes the server for a proxy."""
    argv = ["curl", "-s", "-o", "/dev/null", "-x", f"http://127.0.0.1:{port}", "-U",
            f"svc-report:{PASSWORD}", "http://files.example/echo"]  # fmt: skip
    subprocess.run(argv, capture_output=True, check=True, timeout=20)


def trailers(port):
    spoken(port, b"GET /trailers HTTP/1.1\r\nHost: a\r\n\r\n")


def hints(port):
    spoken(port, b"GET /hints HTTP/1.1\r\nHost: a\r\n\r\n")


def endless(port):
    spoken(port, b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")


def websocket(port):
    spoken(port, b"GET /socket HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                 b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\n",
           b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58")  # fmt: skip


def tunnel(port):
    secret = f"Proxy-Authorization: Basic {BASIC}\r\n\r\n".encode()
    spoken(port, b"CONNECT db.example:443 HTTP/1.1\r\nHost: db.example:443\r\n" + secret,
           b"\x16\x03\x01 no real handshake")  # fmt: skip


def tunnel_refused(port):
    spoken(port, b"CONNECT forbidden.example:443 HTTP/1.1\r\nHost: forbidden.example:443\r\n\r\n",
           b"GET /hints HTTP/1.1\r\nHost: a\r\n\r\n")  # fmt: skip


def h2(port):
    """HTTP/2 with prior knowledge is nothing that this protocol claims."""
    curl("--http2-prior-knowledge", f"http://127.0.0.1:{port}/echo")


NGINX = {
    "curl": curl_session, "curl-upload": curl_upload, "curl-too-large": curl_too_large,
    "http-client": http_client, "pipelined": pipelined, "http-1.0": http_1_0, "closes": closes,
    "absolute": absolute,
}  # fmt: skip
OTHER = {
    "trailers": trailers, "hints": hints, "endless": endless, "websocket": websocket,
    "tunnel": tunnel, "tunnel-refused": tunnel_refused,
}  # fmt: skip


def watch(name, scenario, port, remark, folder="http1"):
    """Run a client through a recorder and write what was said."""
    recorder = Recorder(("127.0.0.1", port))
    scenario(recorder.port)
    time.sleep(QUIET_S)
    recorder.close()
    for number, pieces in enumerate(recorder.connections):
        suffix = f"-{number + 1}" if len(recorder.connections) > 1 else ""
        everything = b"".join(data or b"" for _, data in pieces)
        secrets = [secret.encode() for secret in SECRETS if secret.encode() in everything]
        save(HERE / folder / f"{name}{suffix}.txt", pieces, secrets, [remark])
        print(name + suffix, len(everything))


def main(names):
    with Nginx() as nginx, answers() as port:
        for name, scenario in NGINX.items():
            if not names or name in names:
                watch(name, scenario, nginx.port, f"{name} against nginx")
        if not names or "h2" in names:
            watch("h2", h2, nginx.h2_port, "HTTP/2 with prior knowledge against nginx", "opaque")
        for name, scenario in OTHER.items():
            if not names or name in names:
                watch(name, scenario, port, f"{name} against a server of the tests")


if __name__ == "__main__":
    main(sys.argv[1:])
