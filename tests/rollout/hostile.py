"""A server that does what it likes: bytes on a socket, without a library that would keep to the protocol."""

import contextlib
import json
import re
import socket
import socketserver
import threading


class Hostile(socketserver.ThreadingTCPServer):
    """`with Hostile(answer) as server:` calls answer(request) for each request and sends its bytes, or each of them."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Connection)
        self.answer, self.requests, self.closed = answer, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closed.set()
        self.shutdown()
        self.server_close()

    def drip(self, head, *, every=0.02):
        """The head, and then a byte from time to time until the test is over."""
        yield head
        while not self.closed.wait(every):
            yield b"x"


class Connection(socketserver.BaseRequestHandler):
    def handle(self):
        text = b""
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in text:
                text += self.request.recv(1 << 16) or b"\r\n\r\n"
            length = re.search(rb"content-length: (\d+)", text, re.IGNORECASE)
            while length and len(text.partition(b"\r\n\r\n")[2]) < int(length[1]):
                text += self.request.recv(1 << 16)
            self.server.requests.append(text.decode("latin-1"))
            answer = self.server.answer(text.decode("latin-1"))
            for part in [answer] if isinstance(answer, bytes) else answer:
                self.request.sendall(part)
            self.request.shutdown(socket.SHUT_RDWR)


def http(content, status="200 OK", **headers):
    """The bytes of an answer; content that is not bytes is sent as JSON."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [
        f"{name.replace('_', '-')}: {value}" for name, value in {"Content_Length": len(content), **headers}.items()
    ]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1") + content


MODELS = http({"data": [{"id": "tiny"}]})
