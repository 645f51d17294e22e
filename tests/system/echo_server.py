"""A program: answers every byte with itself, for any number of connections.

    python echo_server.py ADDRESS PORT

Says "ready" on its output when it listens; ends with its input.
"""

import contextlib
import resource
import select
import socket
import sys


def main(address, port):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.create_server((address, int(port)), backlog=4096)
    listener.setblocking(False)
    poll = select.epoll()
    for source in (listener, sys.stdin):
        poll.register(source.fileno(), select.EPOLLIN)
    connections = {}
    print("ready", flush=True)
    while True:
        for fd, _ in poll.poll():
            if fd == sys.stdin.fileno():
                return
            if fd == listener.fileno():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock, _ = listener.accept()
                        connections[sock.fileno()] = sock
                        poll.register(sock.fileno(), select.EPOLLIN)
                continue
            try:
                data = connections[fd].recv(65536)
                if data:
                    connections[fd].sendall(data)
            except OSError:
                data = b""
            if not data:
                connections.pop(fd).close()


main(*sys.argv[1:])
