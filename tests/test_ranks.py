"""The watch over ranks listens to its own run alone; locks of builds; folders that all nodes have to see."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from torch.utils.file_baton import FileBaton

from core import claims, ranks
from helpers import training


@pytest.fixture
def watch():
    """Rank 0's watch without a process group: what `listen` needs."""
    watch = ranks.Watch.__new__(ranks.Watch)
    watch.limit, watch.peers, watch.token, watch.last_words = 5, [], "0123", "rank 0 has died"
    watch.sending, watch.ended, watch.strangers = threading.Lock(), [], set()
    watch.end = watch.ended.append
    return watch


def hear(watch, *lines):
    """What a stranger or a rank that sends these lines and goes leaves behind; what it was told."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=watch.listen, args=[ours, True])
    thread.start()
    theirs.sendall(b"".join(lines))
    theirs.shutdown(socket.SHUT_WR)
    thread.join(10)
    assert not thread.is_alive()
    ours.close()
    with contextlib.suppress(ConnectionResetError):  # not all that was sent was read
        return theirs.recv(1000)
    return b""


def test_a_stranger_cannot_end_the_run_and_is_told_nothing(watch):
    for lines in ([b"rank 1 of a stranger says bye\n"], [b"\xff\xfe" * 40], [b"x" * 10000], [b"0123x\nrank 1\n"], []):
        assert hear(watch, *lines) == b"", lines
    assert not watch.ended and not watch.peers


def test_a_stranger_that_says_nothing_is_dropped(watch, monkeypatch):
    """Or that says a letter of the token now and then."""
    monkeypatch.setattr(ranks, "TOKEN_SECONDS", 0.5)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=watch.listen, args=[ours, True])
    thread.start()
    for letter in b"012":
        theirs.sendall(bytes([letter]))
        time.sleep(0.2)
    thread.join(5)
    assert not thread.is_alive() and theirs.recv(10) == b"" and not watch.peers and not watch.ended


class Listening:
    """A server's socket: what `accept` meets, one after the other."""

    def __init__(self, *meets):
        self.meets = list(meets)

    def accept(self):
        met = self.meets.pop(0)
        if isinstance(met, Exception):
            raise met
        return met, ("127.0.0.1", 1)


def test_many_strangers_and_a_moment_without_open_files_end_nothing(watch, monkeypatch):
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    listened = []
    monkeypatch.setattr(watch, "start_listening", lambda peer, unknown: listened.append(peer))
    server = Listening(OSError(24, "Too many open files"), TimeoutError(), *(socket.socket() for _ in range(100)))
    while server.meets:
        watch.accept(server)
    assert len(listened) == 2 + ranks.MORE_STRANGERS == len(watch.strangers)
    watch.strangers.clear()
    for peer in listened:
        peer.close()


def test_a_rank_that_goes_without_a_word_ends_the_run_with_its_last_words(watch):
    assert hear(watch, b"0123\n", b"rank 1 lives\n", b"rank 1 has died\n") == b"rank 0 has died\n"
    assert watch.ended == ["rank 1 has died"]
    hear(watch, b"0123\n", b"rank 2 lives\n", b"\n")
    assert watch.ended == ["rank 1 has died"], "the empty line is a good end"


def test_a_forked_process_closes_the_connections_and_nothing_else(watch):
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    watch.peers.append(ours)
    child = os.fork()
    if not child:
        watch.close_after_fork()
        os.write(writing, b"open")
        try:
            os.fstat(ours.fileno())
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0 and os.read(reading, 4) == b"open"
    theirs.close()


HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"


@pytest.fixture
def held(tmp_path, monkeypatch):
    """(lock, process): a lock as torch takes it when it builds an extension, and the process that holds it."""
    monkeypatch.setattr(ranks, "LOCK_PATIENCE", 0.3)
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield lock, process
        process.kill()


def acquire(lock):
    """A thread that acquires a lock, and the list into which it puts the answer."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ranks.acquire_build_lock(FileBaton(lock))), daemon=True)
    thread.start()
    return thread, answers


def test_lock_of_a_build_that_was_killed_is_taken_over(held, capsys):
    lock, process = held
    thread, answers = acquire(lock)
    thread.join(1)
    assert not answers and lock.exists()  # the process lives
    process.kill()
    process.wait()
    thread.join(10)
    assert answers == [True] and lock.exists()
    assert capsys.readouterr().err == f"{lock} was left by a build that was interrupted: removed\n"


def test_build_of_another_process_is_waited_for(held):
    lock, _ = held
    thread, answers = acquire(lock)
    thread.join(1)
    assert not answers
    lock.unlink()
    thread.join(10)
    assert answers == [False] and not lock.exists()


def test_lock_of_another_machine_is_taken_over_after_a_quarter_of_an_hour(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    monkeypatch.setattr(claims, "file_system", lambda path: "nfs4")
    for age, abandoned in ((880, False), (901, True)):
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
        assert ranks.is_abandoned(lock) == abandoned
    lock.unlink()
    assert not ranks.is_abandoned(lock)


def test_training_takes_locks_over(work, tmp_path, monkeypatch):
    monkeypatch.setattr(FileBaton, "try_acquire", ranks.try_acquire)
    training.run(work, tmp_path / "out", "--dry_run")
    assert FileBaton.try_acquire is ranks.acquire_build_lock


@pytest.fixture
def group():
    """A process group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())


def test_folder_that_a_node_does_not_see_is_named(group, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks.os.path, "exists", lambda path: False)
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "node-b")
    with pytest.raises(SystemExit):
        ranks.check_shared("output_dir", tmp_path, patience=0.1)
    line = capsys.readouterr().err
    assert f"output_dir {tmp_path} is another folder on node-b" in line and not list(tmp_path.iterdir())


def test_folder_whose_files_appear_late_is_shared(group, tmp_path, monkeypatch):
    """As on mounted storage, where another node sees a file once it is closed, or when its cache runs out."""
    seen, exists = [], os.path.exists

    def late(path):
        seen.append(path)
        handles = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        closed = path not in [os.readlink(handle) for handle in handles if exists(handle)]
        return len(seen) > 3 and closed and exists(path)

    monkeypatch.setattr(ranks.os.path, "exists", late)
    ranks.check_shared("output_dir", tmp_path)
    assert len(seen) == 4 and not list(tmp_path.iterdir())
