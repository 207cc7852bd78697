"""No wait lasts for good: limits, signals, launchers that are gone, workers that are stopped, small shared memory."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from core import dataloader, ranks, waits
from helpers import tiny, training


@pytest.fixture
def ended(monkeypatch):
    """The reasons for which the process would end; its watcher is only asked by the test."""
    monkeypatch.setattr(waits.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(waits.Watcher, "running", None)
    reasons = []
    waits.watch(100, reasons.append)
    return reasons


def look(seconds):
    """What the watcher sees this long from now."""
    waits.Watcher.running.look_at_waits(time.monotonic() + seconds)


def test_a_wait_is_told_of_and_then_ends_the_program(ended, capsys):
    look(1000)  # nothing is waited for
    with waits.waiting_for("the train"):
        look(50)
        assert not ended and not capsys.readouterr().err
        for _ in range(2):
            look(70)
        assert capsys.readouterr().err == "waiting for the train, at most 100 s\n" and not ended
        with waits.waiting_for("the bus"):
            look(101)
    assert ended == ["the bus has not come for 101 s (dist_timeout)"]
    look(1000)
    assert len(ended) == 1


def test_a_signal_ends_a_wait_but_not_a_step(ended):
    with ranks.stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        look(1000)  # a step that takes long is waited for
        with waits.waiting_for("the next step's data"):
            look(waits.GRACE - 1)
            assert not ended
            look(waits.GRACE + 1)
    assert ended == ["SIGTERM asks for an end, but this waits for the next step's data: what is saved stays"]
    with waits.waiting_for("something else"):
        look(50)
    assert len(ended) == 1, "what was asked for is done"


# --- the launcher ---

LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(process.pid, flush=True)
process.wait()
"""
RANK = """
import sys, time
from core import ranks, waits
waits.watch(100, print)
with ranks.stop_signals() as asked:
    print("ready", flush=True)
    while not asked:
        time.sleep(0.1)
    print(asked[0], flush=True)
"""


@pytest.mark.parametrize(
    "words",
    [
        ("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train_eagle3.py"),
        ("python3", "-m", "torch.distributed.run", "train_eagle3.py"),
        ("/usr/bin/python3", "/usr/local/bin/deepspeed", "train_eagle3.py"),
        ("python", "-u", "-m", "torch.distributed.run", "--nnodes", "2"),
    ],
)
def test_launchers_are_known_by_their_command_lines(words, monkeypatch):
    above = [SimpleNamespace(cmdline=lambda: list(words)), SimpleNamespace(cmdline=lambda: ["bash", "run.sh"])]
    monkeypatch.setattr(waits.psutil, "Process", lambda: SimpleNamespace(parents=lambda: above))
    assert waits.find_launchers() == above[:1]


@pytest.mark.parametrize(("name", "is_launcher"), [("torchrun", True), ("launch_all.py", False)])
def test_a_rank_whose_launcher_was_killed_stops(name, is_launcher, tmp_path):
    """What else has started it may go: a shell, a script."""
    script = tmp_path / name
    script.write_text(LAUNCHER)
    command = [sys.executable, script, RANK]
    pipe = subprocess.PIPE
    options = {"stdout": pipe, "stderr": subprocess.STDOUT, "text": True, "cwd": tiny.REPOSITORY}
    with subprocess.Popen(command, env=tiny.environment(), **options) as launcher:
        rank = psutil.Process(int(launcher.stdout.readline()))
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        if is_launcher:
            rank.wait(20)
            printed = launcher.stdout.read()
            assert f"the launcher (pid {launcher.pid}) is gone: this rank stops\nSIGTERM\n" in printed
        else:
            time.sleep(3)
            assert rank.is_running()
            rank.kill()


# --- the readers ---


def steps_of(work, workers, name="train"):
    """The steps of the prepared data, as training reads them."""
    data, _ = dataloader.open_data(work / "data")

    class Source:
        @staticmethod
        def fetch(data, assigned):
            for numbers in assigned[data.rank]:
                yield [data.row(number) for number in numbers], None

        @staticmethod
        def steps(data, steps, load):
            return load(steps)

    def collate(rows, epoch):
        return dataloader.Batch(**dataloader.concatenate(rows, epoch), plan=None, normaliser=0)

    sizes = {"seed": 0, "global_batch_size": 2, "micro_batch_size": 2, "num_workers": workers, "prefetch_factor": 1}
    return dataloader.read_steps(data["train"], Source, collate, torch.device("cpu"), range(9), name=name, **sizes)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(dataloader.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dataloader.dist, "get_world_size", lambda: 1)


def test_a_stopped_worker_is_named(work, one_rank, monkeypatch):
    monkeypatch.setattr(waits.Watcher, "running", None)
    reasons = []

    def end(reason):
        reasons.append(reason)
        waits.Watcher.running.limit = 100
        stopped.resume()

    waits.watch(2, end)
    with contextlib.closing(steps_of(work, 1)) as steps:
        next(steps)
        (worker,) = multiprocessing.active_children()
        stopped = psutil.Process(worker.pid)
        stopped.suspend()
        assert len(list(steps)) == 8, "goes on when the worker does"
    (reason,) = reasons
    assert reason.startswith("the next step's data") and f"pid {stopped.pid} stopped" in reason


def test_a_stopped_worker_does_not_outlive_what_it_reads_for(work, one_rank, monkeypatch):
    """Python would wait for it at its exit, without end."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # torch's patience with it
    with contextlib.closing(steps_of(work, 1)) as steps:
        next(steps)
        (worker,) = multiprocessing.active_children()
        psutil.Process(worker.pid).suspend()
    worker.join(5)
    assert not worker.is_alive()


def test_steps_that_do_not_fit_into_shared_memory_are_one_line(work, one_rank, tmp_path, monkeypatch, capsys):
    """What is free is compared at the start: nothing is read if it cannot be handed over."""
    with tiny.small_disk(tmp_path / "shm", 4) as (folder, _):
        (folder / "filler").write_bytes(bytes(4096))
        monkeypatch.setattr(dataloader, "SHARED_MEMORY", folder)
        with contextlib.closing(steps_of(work, 2)) as steps:
            line = training.refused(capsys, next, steps)
        assert line.startswith(f"{folder} is too small: 2 steps that are read ahead take ") and "--shm-size" in line
        assert len(list(steps_of(work, 0))) == 9
        assert len(list(steps_of(work, 2, "validation"))) == 9, "an evaluation in a training that has all the room"


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_all_ranks_of_a_node_share_its_memory(variable, monkeypatch):
    packed = [], {torch.uint8: torch.zeros(10**6, dtype=torch.uint8)}
    monkeypatch.setattr(dataloader.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**6))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert dataloader.find_shortage(packed, 2) == ""
    monkeypatch.setenv(variable, "4")
    expected = "2 steps that are read ahead by each of 4 ranks take 8 MB, 3 MB are free"
    assert dataloader.find_shortage(packed, 2) == expected


def test_a_worker_waits_for_room_and_then_says_so(work, one_rank, monkeypatch, capsys):
    """In the worker itself: torch's own thread would lose the step."""
    original = torch.Tensor.share_memory_
    tries = []

    def share_memory_(tensor):
        tries.append(1)
        if len(tries) > 3:
            return original(tensor)
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share_memory_)
    assert len(list(steps_of(work, 1))) == 9, "there is room after a while"
    monkeypatch.setattr(dataloader, "SHARED_PATIENCE", -1)
    tries.clear()
    with contextlib.closing(steps_of(work, 1)) as steps:
        line = training.refused(capsys, list, steps)
    assert "is too small: " in line and "No space left on device" in line


FAILING = """
import sys
from torch.utils.data import get_worker_info
import train_eagle3
from core import dataloader, ranks

original = dataloader.Steps.row

def row(data, number):
    if get_worker_info():
        raise ValueError("this row cannot be read")
    return original(data, number)

dataloader.Steps.row = row
ranks.run_watched(train_eagle3.main, train_eagle3.parse_args(sys.argv[1:]))
"""


def test_a_reading_process_that_fails_ends_the_training(work, tmp_path):
    """The others ignore SIGTERM, and Python would wait for them at its exit."""
    argv = training.arguments(work, tmp_path / "out", "--num_workers", 2, "--report_to", "none")
    options = {"capture_output": True, "text": True, "check": False, "timeout": 100, "cwd": tiny.REPOSITORY}
    done = subprocess.run([sys.executable, "-c", FAILING, *argv], env=tiny.environment(), **options)
    assert done.returncode == 1 and "ValueError: this row cannot be read" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="no mount namespaces here")
def test_training_in_a_container_with_little_shared_memory_ends_with_a_line(work, tmp_path):
    argv = training.arguments(work, tmp_path / "out", "--num_workers", 2)
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "train_eagle3.py", *argv]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 200, "cwd": tiny.REPOSITORY}
    done = subprocess.run(command, env=tiny.environment(), **options)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 2 and "error: /dev/shm is too small: " in done.stderr
