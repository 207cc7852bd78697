"""Tiny tokenizers, targets and conversations that the tests build for themselves."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

# A training in the tests' own process sets these.
LAUNCHERS_OWN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"}
REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH_MANY = Path(__file__).with_name("launch_many.py")
sys.path.insert(0, str(REPOSITORY / "examples"))

from make_tiny_target import train_tokenizer  # noqa: E402  (examples/ is not a package)

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Return the absolute value of the argument. The argument may be an integer or a floating point number.",
    "A generator is a function which returns an iterator. It looks like a normal function except for yield.",
    "Hello! How can I help you today? Please tell me more about what you want to do.",
] * 4


def environment(**given):
    """Variables for a process that a test starts: those of here but a launcher's, one thread, and the given ones."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_OWN}
    return {**own, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in given.items()}}


@contextmanager
def small_disk(folder, size):
    """A file system of size KiB of its own at folder, and a function that changes its size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if not done or done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


WRITER = """
import sys
from core import claims
with claims.only_writer("output_dir", *sys.argv[1:]):
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_writer(*claim):
    """Another process that has claimed a folder (claim: folder, name of the file): the process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WRITER, *claim], cwd=REPOSITORY, **pipes) as process:
        process.stdout.readline()
        yield process
        process.stdin.close()


def free_port():
    """A port that nobody has now, below those that the system gives out: what starts later still finds it free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with suppress(OSError), socket.create_server(("", port)):
            return port


def tokenizer(vocab_size=400, **options):
    return train_tokenizer(TEXTS, vocab_size, **options)


def conversations(count, turns=1):
    """count conversations of `turns` questions and answers of different lengths, as rows of a JSON Lines file."""
    rows = []
    for i in range(count):
        messages = []
        for turn in range(turns):
            answer = " ".join(TEXTS[(i + turn + k) % 4] for k in range(1 + i % 3))
            messages += [
                {"role": "user", "content": f"Question {i}.{turn}: what is {TEXTS[i % 4][:20]}?"},
                {"role": "assistant", "content": answer},
            ]
        rows.append({"id": str(i), "conversations": messages})
    return rows


def write_jsonl(path, rows):
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def llama_config(vocab_size=400, layers=8, **options):
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(vocab_size=vocab_size, num_hidden_layers=layers, **{**sizes, **options})


def write_target(folder, seed=0, layers=8, vocab_size=400, max_shard_size="5GB", **options):
    """A random Llama target with its tokenizer in a Hugging Face folder; weights large enough to make its text vary."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(vocab_size, layers, initializer_range=0.2, **options))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer(vocab_size).save_pretrained(folder)
    return Path(folder)


def fails(capsys, function, *arguments, **options):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments, **options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def on_ranks(ranks, *command, timeout=400):
    """A script and its arguments on so many ranks of torchrun; returns the finished process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [*launch, *map(str, command)], capture_output=True, text=True, timeout=timeout, check=False, env=environment()
    )


def launch_many(ranks, runs, *command, code=0):
    """Command lines one after another on the same ranks, each of which ends with this code; returns the process.

    command: the name of the command, if it is not train_eagle3.
    """
    result = on_ranks(ranks, LAUNCH_MANY, json.dumps(runs), *command)
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"exit {[[code] * len(runs)] * ranks}" in result.stdout.splitlines(), result.stdout[-2000:] + result.stderr
    return result
