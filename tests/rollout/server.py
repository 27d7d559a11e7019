"""A server that generates: our local engine behind the paths of vLLM and SGLang, over real HTTP.

It draws with the key that the seed on the wire is, so its responses are those of the local engine.
"""

import http.server
import json
import threading
from pathlib import Path

import jax
import numpy as np

from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.slots import Sampling


class Wired(LocalEngine):
    """Its requests' keys are the 64 bits of a seed on the wire."""

    def request_keys(self, key, seeds):
        words = np.frombuffer(self.seed.to_bytes(8, "big", signed=True), ">u4").astype(np.uint32)
        return jax.random.wrap_key_data(np.tile(words, (len(seeds), 1)))


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `with Server(folder) as server:` listens at `server.url`."""

    def __init__(self, folder, *, slots=8):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.seen = threading.Lock(), []  # requested paths
        self.failures = []  # (status, text) of the next answers
        self.edit = lambda answer: answer  # changes an answer
        config = huggingface.read_config(str(folder))
        self.config, self.engine = config, Wired(make_decoder(config, remat="none")[0], slots=slots)
        self.load(folder)

    def load(self, folder):
        self.folder, self.params = Path(folder), load_params(str(folder), self.config)

    def respond(self, prompt, seed, limit, body):
        sampling = Sampling(
            limit,
            body["temperature"],
            top_k=max(body["top_k"], 0),
            top_p=body["top_p"],
            min_p=body["min_p"],
            repetition_penalty=body["repetition_penalty"],
            terminators=tuple(body["stop_token_ids"]),
        )
        with self.lock:
            self.engine.seed = seed
            requests = [Request(tuple(prompt), 0)]
            return self.engine.generate(self.params, requests, jax.random.key(0), sampling=sampling)[0]

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, request, client_address):
        """Logs nothing when a client has left."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        self.server.seen.append(self.path)
        if self.server.failures:
            return self.send(*self.server.failures.pop(0))
        respond = PATHS.get(self.path)
        if respond is None:
            return self.send(404, '{"detail":"Not Found"}')
        return self.send(200, json.dumps(self.server.edit(respond(self.server, body))))

    def send(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *message):
        """Logs nothing."""


def models(server, body):
    return {"object": "list", "data": [{"id": "tiny", "max_model_len": server.config.max_length}]}


def completions(server, body):
    assert body["model"] == "tiny" and body["n"] == 1 and body["return_token_ids"]
    drawn = server.respond(body["prompt"], body["seed"], body["max_tokens"], body)
    logprobs = {"token_logprobs": drawn.logps.tolist(), "tokens": [f"token_id:{t}" for t in drawn.tokens]}
    reason = "stop" if drawn.finished else "length"
    return {"choices": [{"token_ids": drawn.tokens.tolist(), "logprobs": logprobs, "finish_reason": reason}]}


def sglang_generate(server, body):
    assert body["return_logprob"]
    settings = body["sampling_params"]
    drawn = server.respond(body["input_ids"], settings["sampling_seed"], settings["max_new_tokens"], settings)
    pairs = [[p, t, None] for p, t in zip(drawn.logps.tolist(), drawn.tokens.tolist(), strict=True)]
    return {
        "meta_info": {
            "output_token_logprobs": pairs,
            "finish_reason": {"type": "stop" if drawn.finished else "length"},
        }
    }


def collective_rpc(server, body):
    assert body["method"] == "reload_weights"
    server.load(body["kwargs"]["weights_path"])
    return {"results": [None]}


def update_weights(server, body):
    server.load(body["model_path"])
    return {"success": True}


PATHS = {
    "/v1/models": models,
    "/v1/completions": completions,
    "/generate": sglang_generate,
    "/collective_rpc": collective_rpc,
    "/reset_prefix_cache": lambda server, body: None,
    "/update_weights_from_disk": update_weights,
}
