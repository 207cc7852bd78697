"""Answers of servers that never end, whatever they send: limits of time and of size."""

import contextlib
import http.server
import threading
import time

import pytest

from core import server


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the same part over and over again, until the client goes."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(self.server.part)
                time.sleep(self.server.pause)

    do_GET = do_POST


@contextlib.contextmanager
def sends(part, pause=0.0):
    """The URL of a server whose answers never end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as endless:
        endless.part = part
        endless.pause = pause
        thread = threading.Thread(target=endless.serve_forever, args=[0.05])
        thread.start()
        yield f"http://127.0.0.1:{endless.server_port}"
        endless.shutdown()
        thread.join()


@pytest.mark.parametrize("part", [b"d", b"data: {}\n", b": still there\n"])
def test_a_stream_ends_by_its_time(part):
    """Each byte comes before the server counts as silent."""
    start = time.monotonic()
    with sends(part, 0.05) as url, pytest.raises(TimeoutError, match="does not end"):
        for event in server.stream_answer(url, "v1/completions", {}, timeout=5, longest=0.5):
            assert event == {}
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("part", [b"data: " + b"x" * 1000, b"data: {}\n" * 100])
def test_a_stream_ends_by_its_size(part, monkeypatch):
    monkeypatch.setattr(server, "ANSWER_BYTES", 100_000)
    with sends(part) as url, pytest.raises(ValueError, match="more than 100,000 bytes"):
        list(server.stream_answer(url, "v1/completions", {}, timeout=5))


@pytest.mark.parametrize("what", ["time", "size"])
def test_an_answer_ends_too(what, monkeypatch):
    monkeypatch.setattr(server, "ANSWER_BYTES", 100_000)
    pause, timeout, problem = {"time": (0.05, 0.3, "does not end"), "size": (0, 20, "more than 100,000")}[what]
    with sends(b"x" * 1000, pause) as url, pytest.raises((TimeoutError, ValueError), match=problem):
        server.read_answer(url, "metrics", timeout=timeout)
