"""What this process waits for: each wait has a limit, and a line that names what did not come.

A thread looks at the waits once a second. It also ends a wait that goes on while a signal asks for an end, as the step
behind which the training would stop never comes, and stops ranks whose launcher is gone.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

NOTICE = 60  # seconds after which a wait is told of
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # they ask a training for an end
GRACE = 20  # seconds that a wait may still take when a signal has asked for an end
LAUNCHERS = {"deepspeed", "torchrun", "deepspeed.launcher.launch", "torch.distributed.run", "torch.distributed.launch"}


@dataclass
class Wait:
    """A wait that is under way."""

    what: str
    begun: float
    limit: float | None  # seconds; None: the watcher's
    told: bool = False


class Watcher:
    """The thread, and what it looks at; one of a process."""

    running = None

    def __init__(self):
        self.limit = None  # seconds
        self.end = None  # end(reason) ends this process
        self.waits = []  # the innermost last
        self.asked = None  # (name, time) of the signal that has asked for an end
        self.launchers = find_launchers()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            time.sleep(1)
            self.look_at_waits(time.monotonic())
            self.look_at_launchers()

    def look_at_waits(self, now):
        """End the process if its innermost wait takes too long; tell of it before."""
        wait = next(reversed(self.waits), None)
        if not wait:
            return
        seconds = now - wait.begun
        limit = wait.limit or self.limit
        if self.asked and now - max(self.asked[1], wait.begun) > GRACE:
            self.end(f"{self.asked[0]} asks for an end, but this waits for {describe(wait)}: what is saved stays")
        elif seconds > limit:
            self.end(f"{describe(wait)} has not come for {seconds:.0f} s (dist_timeout)")
        elif seconds > NOTICE and not wait.told:
            wait.told = True
            print(f"waiting for {describe(wait)}, at most {limit:.0f} s", file=sys.stderr, flush=True)

    def look_at_launchers(self):
        """Stop as on SIGTERM if one of the launchers is gone: nothing else would end this rank."""
        gone = [process for process in self.launchers if has_ended(process)]
        if gone:
            self.launchers = []
            print(f"the launcher (pid {gone[0].pid}) is gone: this rank stops", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def find_launchers():
    """The processes above this one that are launchers, as their command lines say."""
    found = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if LAUNCHERS & {Path(word).name for word in process.cmdline()[:5]}:
                found.append(process)
    return found


def has_ended(process):
    """Whether a process has ended, though its parent may not have looked yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def describe(wait):
    """What a wait is for, and the state of the processes that this one has started."""
    states = []
    for child in multiprocessing.active_children():
        with contextlib.suppress(psutil.Error):
            states.append(f"pid {child.pid} {psutil.Process(child.pid).status()}")
    return wait.what + (f" ({', '.join(states)})" if states else "")


def watch(limit, end):
    """Watch the waits of this process from now on: none may take more than `limit` seconds; end(reason) ends it."""
    Watcher.running = Watcher.running or Watcher()
    Watcher.running.limit = limit
    Watcher.running.end = end


@contextlib.contextmanager
def waiting_for(what, limit=None):
    """The program waits for `what` meanwhile, at most `limit` seconds; None: those of `watch`."""
    watcher = Watcher.running
    wait = Wait(what, time.monotonic(), limit)
    if watcher:
        watcher.waits.append(wait)
    try:
        yield
    finally:
        if watcher:
            watcher.waits.remove(wait)


def ask_for_end(name):
    """A signal of this name has asked for an end; None: no signal has, or what it asked for is done."""
    if Watcher.running:
        Watcher.running.asked = name and (name, time.monotonic())
