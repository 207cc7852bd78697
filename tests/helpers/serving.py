"""A small server that answers as vLLM or SGLang does, with planned acceptance, and faults on demand."""

import contextlib
import http.server
import json
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Plan:
    """What a server says and does. accepted(ids): drafts accepted in each pass behind a prompt, again and again."""

    engine: str = "vllm"
    model: str = "target"
    accepted: object = lambda ids: [1]
    drafts: int | None = 3  # per pass; None: no draft
    max_model_len: int = 1000
    cumulative: bool = True  # SGLang: each part has all tokens up to now
    stats: bool = True  # vLLM: /metrics counts
    delay: float = 0  # seconds for each part
    late: float = 0  # seconds until the counters have a reply
    others: int = 0  # tokens that are counted for other requests
    lost: int = 0  # tokens that are not counted
    refused: object = lambda ids: False
    breaks: object = lambda ids: False  # in the middle of the reply
    silent: object = lambda ids: False
    fails: object = lambda ids: False  # by an event of the stream
    per_request: bool = False  # vLLM: --per-request-spec-decode-metrics summary
    token_ids: bool = True
    offset: int = 0  # of the tokens that it says
    end: int | None = None  # tokens after which replies end
    log: list = field(default_factory=list)  # of the prompts of all servers that share it


def reply_of(ids, count, offset=0):
    """The tokens that a server says behind a prompt."""
    return [5 + (sum(ids) + offset + i) % 90 for i in range(count)]


def passes_of(plan, ids, count):
    """(drafts accepted in each pass, tokens of each part) of a reply of `count` tokens; the first part has no draft."""
    accepted, parts, told = [], [1], 1
    pattern = plan.accepted(ids) if plan.drafts else [0]
    while told < count:
        accepted.append(pattern[len(accepted) % len(pattern)])
        parts.append(min(accepted[-1] + 1, count - told))
        told += parts[-1]
    return accepted, parts


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, data, code=200):
        data = data.encode() if isinstance(data, str) else json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        plan = self.server.plan
        if self.path == "/v1/models":
            model = {"id": plan.model, "root": plan.model, "owned_by": plan.engine, "max_model_len": plan.max_model_len}
            self.answer({"data": [model]})
        elif self.path == "/metrics" and plan.engine == "vllm":
            self.answer(self.metrics())
        else:
            self.answer({"detail": "Not Found"}, 404)

    def metrics(self):
        plan, labels = self.server.plan, 'engine="0",model_name="target"'
        lines = ["# HELP python_info Python", 'python_info{version="3.11"} 1.0']
        with self.server.counting:
            if plan.stats:
                lines += ["# TYPE vllm:generation_tokens_total counter"]
                lines += [f"vllm:generation_tokens_total{{{labels}}} {float(self.server.tokens)}"]
                lines += [f"vllm:generation_tokens_created{{{labels}}} 1.7e+09"]
            if plan.stats and plan.drafts:
                name, histogram = "vllm:spec_decode_num", self.server.histogram
                lines += [f"{name}_drafts_total{{{labels}}} {float(sum(histogram))}"]
                for i in range(plan.drafts):
                    reached = float(sum(histogram[i + 1 :]))
                    lines += [f'{name}_accepted_tokens_per_pos_total{{{labels},position="{i}"}} {reached}']
        return "\n".join(lines) + "\n"

    def count(self, tokens, accepted):
        time.sleep(self.server.plan.late)
        with self.server.counting:
            self.server.tokens += tokens
            for number in accepted:
                self.server.histogram[number] += 1

    def do_POST(self):
        server, plan, body = (
            self.server,
            self.server.plan,
            json.loads(self.rfile.read(int(self.headers["Content-Length"]))),
        )
        is_vllm = plan.engine == "vllm"
        assert self.path == ("/v1/completions" if is_vllm else "/generate")
        ids = body["prompt"] if is_vllm else body["input_ids"]
        most = body["max_tokens"] if is_vllm else body["sampling_params"]["max_new_tokens"]
        with server.counting:
            server.requests.append(body)
            server.busy += 1
            server.most = max(server.most, server.busy)
        plan.log.append((plan.model if plan.drafts else "baseline", tuple(ids)))
        try:
            complete = self.reply(plan, ids, most)
        finally:
            with server.counting:
                server.busy -= 1
        if complete:  # what follows it may be under way at once
            self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, plan, ids, most):
        """Send the parts of a reply; whether it is complete."""
        if plan.refused(ids):
            return self.answer({"error": {"message": "the prompt is too long"}}, 400)
        self.send_response(200)
        self.end_headers()
        count = min(most, plan.end or most)
        accepted, parts = passes_of(plan, ids, count)
        tokens, told, histogram = reply_of(ids, count, plan.offset), 0, None
        for number, size in enumerate(parts):
            time.sleep(plan.delay)
            if number == 1 and plan.silent(ids):
                time.sleep(1)
            if number == 1 and plan.breaks(ids):
                return False
            if number == 1 and plan.fails(ids):
                return self.event({"error": {"message": "out of memory", "code": 500}})
            told += size
            end = "length" if number + 1 == len(parts) else None
            if plan.drafts and number:
                histogram = [accepted[:number].count(i) for i in range(max(accepted[:number]) + 1)]
            self.event(self.part(tokens, told, size, end, histogram))
        if plan.per_request and plan.engine == "vllm":
            self.event({"choices": [], "metrics": {"speculative_decoding": {"acceptance_histogram": histogram}}})
        threading.Thread(target=self.count, args=(count + plan.others - plan.lost, accepted)).start()
        return True

    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def part(self, tokens, told, size, end, histogram):
        """An event of the stream: the last `size` of the `told` tokens are new."""
        plan = self.server.plan
        if plan.engine == "vllm":
            choice = {"index": 0, "text": "", "finish_reason": end}
            if plan.token_ids:
                choice["token_ids"] = tokens[told - size : told]
            return {"choices": [choice]}
        meta = {"completion_tokens": told, "finish_reason": end and {"type": end, "length": told}}
        if histogram:
            meta |= {"spec_verify_ct": sum(histogram), "spec_correct_drafts_histogram": histogram}
        return {"output_ids": tokens[0 if plan.cumulative else told - size : told], "meta_info": meta}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, *args):
        pass


@contextlib.contextmanager
def serve(**plan):
    """A server, with its URL and what it has seen: requests, most (under way at once)."""
    server = Server(("127.0.0.1", 0), Handler)
    server.plan, server.url = Plan(**plan), f"http://127.0.0.1:{server.server_port}"
    server.counting, server.requests, server.busy, server.most = threading.Lock(), [], 0, 0
    server.tokens, server.histogram = 17, [5, 4, 3, 2, 1, 0, 0, 0]  # of earlier requests
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
