"""A server that does what it likes: bytes on a socket, without a library that would keep to the protocol."""

import contextlib
import json
import re
import socket
import socketserver
import threading

import jax

from jaxalign.rollout.engine.engine import Request
from jaxalign.rollout.engine.http import HttpEngine
from jaxalign.rollout.engine.slots import Sampling


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


KEY = jax.random.key(3)
SAMPLING = Sampling(8, terminators=(2,))
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate([(1, 4, 6), (5,), (1, 4, 6), (9, 10, 11, 12)])]


def engine_of(server, **options):
    """An engine of the server that gives up soon."""
    return HttpEngine(server.url, **{"concurrency": 3, "pause": 0.01, "seconds": 60, **options})


def ask(server, **options):
    """The responses of a hostile server to one request for four tokens out of twenty."""
    return asking(engine_of(server, vocabulary=20, **options))


def asking(engine):
    """The same of an engine."""
    return engine.generate(None, REQUESTS[:1], KEY, sampling=SAMPLING._replace(max_new_tokens=4))


def drawn(kind, *, tokens=(5, 6, 2), logps=(-1.0, -0.5, 0.0), reason="stop"):
    """A right answer, unless it is told otherwise."""
    if kind == "vllm":
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}
        return {"choices": [choice]}
    pairs = [[logp, token, None] for logp, token in zip(logps, tokens, strict=True)]
    return {"meta_info": {"output_token_logprobs": pairs, "finish_reason": {"type": reason}}}


def answering(answer):
    """A server's function that answers every request for a response so."""
    return lambda request: (
        MODELS if request.startswith("GET") else answer if isinstance(answer, bytes) else http(answer)
    )
