"""One writer at a time: a command claims the folder that it writes to, and a second one is refused while it lives.

FOLDER/.writer names the writer, {"host", "pid", "started", "beat"}, and exists while there is one. The writer holds a
lock of this file, which the kernel drops when the process ends, however it ends: on a disk of this machine the lock
decides. On storage that other machines write too, which may have no locks, keep them to each machine, or keep those of
a dead machine for a while, the named process counts on its own host; from elsewhere it counts while its `beat` changes.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import psutil

from core import common

WRITER = ".writer"
SIZE = 256  # bytes of the file: it is overwritten in place, so that no reader finds it empty
BEAT = 5  # seconds between two signs of life
PATIENCE = 45  # seconds without a sign of life after which a writer on another host counts as dead
LOCK_PATIENCE = 120  # seconds in which storage drops the lock of a dead writer: NFSv4, Lustre and SMB take about 90
LOCAL_FILE_SYSTEMS = {"btrfs", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}  # no other machine writes here


@contextlib.contextmanager
def only_writer(name, folder, claim=WRITER):
    """Be the only writer in `folder`, which is created if it does not exist; name: the flag that names it.

    Ends the program with one line if another writer lives, or if the folder cannot be written. claim: the file's name.
    """
    path = Path(folder) / claim
    created = [place for place in (path.parent, *path.parent.parents) if not os.path.lexists(place)]
    stopped = threading.Event()
    beating = None
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = take(name, path)
        me = write_down(name, path, file)
        if not is_local(path):
            beating = threading.Thread(target=beat, args=[file, me, stopped], daemon=True)
            beating.start()
    except OSError as error:
        release(file, path, created)
        common.fail_to_write(name, folder, error)
    try:
        yield
    finally:
        stopped.set()
        if beating:
            beating.join()
        release(file, path, created)


def take(name, path):
    """The file at `path`, open and locked where that is possible; ends the program if a living writer has it."""
    dead = None  # a writer that gave no sign of life
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        locked = try_lock(file)
        if locked is False:
            dead = wait_for_content(file)
            file.close()
            holds = is_local(path) or not dead or time.monotonic() > deadline
            if holds or lives(dead, path):
                refuse(name, path, dead)
            time.sleep(1)
            continue
        if not has_name(file, path):  # its writer has removed it meanwhile
            file.close()
            continue
        writer = read(file)
        if writer in ({}, dead) or (locked and is_local(path)):
            return file
        file.close()  # no lock while others are waited for: closing another handle of the file would drop it
        if lives(writer, path):
            refuse(name, path, writer)
        dead = writer


def write_down(name, path, file):
    """Write this process into the file that it has taken; returns what is written."""
    started = psutil.Process().create_time()
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "beat": 0}
    write(file, me)
    if try_lock(file) is None:  # without locks two may have come to this point
        time.sleep(1)
        with path.open("rb") as again:
            winner = read(again)
        if winner != me:
            refuse(name, path, winner)
    return me


def release(file, path, created):
    """Remove the file of a claim, and the folders created for it, up to the first that is not empty."""
    with contextlib.suppress(OSError):  # of rmdir: what is above such a folder is not empty either
        if file:
            with file:
                if has_name(file, path) and read(file).get("pid") in (os.getpid(), None):
                    path.unlink()  # before the lock goes: who gets it then sees that the file has lost its name
        for place in created:
            place.rmdir()


def refuse(name, path, writer):
    """End the program because of another writer."""
    who = f"host {writer['host']}, pid {writer['pid']}" if writer else "which one is not known"
    common.fail(
        f"{name} {path.parent}: another process writes there ({who}): wait for it to end, or give another folder"
    )


def try_lock(file):
    """Whether this process has the lock of an open file now: True, False, or None where the storage has no locks.

    A lock of this kind belongs to the process alone: its forked workers, which outlive it for seconds, do not keep it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def has_name(file, path):
    """Whether an open file still has its name. Mounted storage may give files new numbers at any time."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return not is_local(path) or os.path.samestat(os.fstat(file.fileno()), found)
    return False


def read(file):
    """The writer in an open file, or {}."""
    file.seek(0)
    try:
        writer = json.loads(file.read())
        return writer if {"host", "pid", "started", "beat"} <= writer.keys() else {}
    except (ValueError, AttributeError):
        return {}


def wait_for_content(file):
    """The writer in an open file that another process has locked: it may be about to write itself down."""
    for _ in range(20):
        if writer := read(file):
            return writer
        time.sleep(0.1)
    return {}


def write(file, writer):
    """Put a writer in the place of what an open file holds."""
    file.seek(0)
    file.write(json.dumps(writer).encode().ljust(SIZE))
    os.fsync(file.fileno())


def beat(file, writer, stopped):
    """Change the file every BEAT seconds; end the process if another writer has taken it over meanwhile.

    It took this one, which was held up or cut off from the storage for long, for dead.
    """
    while not stopped.wait(BEAT):
        with contextlib.suppress(OSError):  # storage that is away for a while
            now = read(file)
            if now and any(now[name] != writer[name] for name in ("host", "pid", "started")):
                lost(now)
            writer["beat"] += 1
            write(file, writer)


def lost(writer):
    """End the process: two would write."""
    print(
        f"error: host {writer['host']}, pid {writer['pid']} has taken over the folder that is written here: this "
        f"process gave no sign of life for {PATIENCE} s",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def lives(writer, path):
    """Whether a writer lives: by its process on this host, elsewhere by its beat."""
    if writer["host"] == socket.gethostname():
        return is_running(writer)
    print(
        f"{path.parent} was claimed by host {writer['host']}, pid {writer['pid']}: looking for {PATIENCE} s whether "
        "it lives",
        file=sys.stderr,
        flush=True,
    )
    for _ in range(PATIENCE):  # counted by looks: storage may be away for a while
        time.sleep(1)
        try:
            with path.open("rb") as file:
                now = read(file)
        except FileNotFoundError:
            return False
        if now and now != writer:
            return True
    return False


def is_running(writer):
    """Whether the process of a writer of this host runs: its number may have gone to another one."""
    try:
        return abs(psutil.Process(writer["pid"]).create_time() - writer["started"]) < 5
    except psutil.Error:
        return False


def is_local(path):
    """Whether no other machine writes to the file system that holds a path."""
    return file_system(path) in LOCAL_FILE_SYSTEMS


def file_system(path):
    """The type of the file system that holds a path, as in "ext4"."""
    path = Path(path).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in [path, *path.parents] if folder in mounts), "unknown")
