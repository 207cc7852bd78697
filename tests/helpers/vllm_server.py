"""A small server that speaks vLLM's protocol, with faults on demand.

`python vllm_server.py TARGET --port N ...` starts it, in the place of `vllm serve`.
"""

import fcntl
import http.server
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

LAYERS = [2, 4, 5]  # of the tiny target, and its last one is 8
HEADS = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}  # which vLLM's CPU build can compute


class Model:
    """What vLLM writes about a text, by transformers: hidden_states [T, n + 1, Ht], the last layer before its norm."""

    def __init__(self, folder, layers=LAYERS):
        self.layers = layers
        self.model, self.lock = AutoModelForCausalLM.from_pretrained(folder).eval(), threading.Lock()
        self.model.model.norm.register_forward_pre_hook(lambda norm, args: setattr(self, "last", args[0][0]))

    def states(self, input_ids):
        with torch.no_grad(), self.lock:
            ids = torch.tensor([input_ids])
            found = self.model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            return torch.stack([*(found[i][0] for i in self.layers), self.last], dim=1)


class Handler(http.server.BaseHTTPRequestHandler):
    """vLLM's answers, or the fault that the server was told to have."""

    def log_message(self, *args):
        pass

    def answer(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        model = {"id": self.server.name, "root": self.server.root, "max_model_len": self.server.max_len}
        models = {"data": [model]} if self.server.models is None else self.server.models
        self.answer(models if self.path == "/v1/models" else {})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = body["prompt"]
        assert self.path == "/v1/completions" and body["max_tokens"] == 1 and body["return_token_ids"] is True
        with server.counting:
            number = len(server.requests)
            server.requests.append(ids)
            server.busy += 1
            server.most = max(server.most, server.busy)
        time.sleep(server.delay)
        try:
            if server.lives is not None and number >= server.lives:
                self.connection.close()
                return
            if number < server.failures:
                return self.answer({"error": "busy"}, 503)
            if body["model"] != server.name:
                return self.answer({"error": "no such model"}, 404)
            path = server.folder / f"cmpl-{os.getpid()}-{number}.safetensors"
            with open(f"{path}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                told = {"hidden_states_path": str(path)}
                choices = [{"prompt_token_ids": ids}] if server.choices is None else server.choices
                self.answer({"choices": choices, "kv_transfer_params": told})
                self.wfile.flush()
                time.sleep(0.02)  # the client has the path before there is a file
                tokens = torch.tensor(ids) + server.shift
                save_file({"hidden_states": server.model.states(ids), "token_ids": tokens}, path)
        finally:
            with server.counting:
                server.busy -= 1


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, *args):
        pass


def open_server(model, name, folder, port=0):
    """A server that is not faulty: set lives (requests until it dies), failures, delay (s), shift (of tokens).

    models and choices: what it answers in their place.
    """
    server = Server(("127.0.0.1", port), Handler)
    vars(server).update(model=model, name=str(name), root=None, folder=Path(folder), max_len=512, requests=[], busy=0)
    vars(server).update(most=0, lives=None, failures=0, delay=0, shift=0, models=None, choices=None)
    server.counting = threading.Lock()
    return server


def main(target, *flags):
    """The small server, started as vLLM is: it prints what it was told and serves until it is stopped."""
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    layers = json.loads(values["--speculative_config"])["draft_model_config"]["hf_config"]
    folder = json.loads(values["--kv_transfer_config"])["kv_connector_extra_config"]["shared_storage_path"]
    server = open_server(Model(target), target, folder, int(values["--port"]))
    server.max_len = int(values["--max-model-len"])
    told = {"layers": layers["eagle_aux_hidden_state_layer_ids"], "max_len": server.max_len, "folder": folder}
    print(json.dumps(told), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
