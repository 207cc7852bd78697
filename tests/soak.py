"""A training to which everything happens, again and again, compared with a calm one; the faults are drawn from a seed.

    python tests/soak.py --minutes 30 --seed 1

Each life of a training ends when it has finished: meanwhile its ranks are killed, stopped or suspended, its disk fills
up, checkpoints are damaged, links become folders, a second start tries the same folder, the number of ranks changes.
On the same number of ranks all along, weights, optimizer and metrics have to be those of the calm run bit by bit, on
others to rounding. Prints the faults as a table; exit code 1 at the first difference.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from core import checkpoints, common  # noqa: E402  (neither the root nor tests/ is on a script's path)
from helpers import resuming, tiny, training  # noqa: E402
from helpers.starts import Starts  # noqa: E402

STEPS = 60
SIZE = 80 * 1024  # KiB of the disk: about twice what a life holds
FLAGS = (
    "--save_steps", 1, "--total_steps", STEPS, "--save_total_limit", 3, "--num_workers", 1, "--resume",
    "--dist_timeout", 1,
)  # fmt: skip


class Life:
    """A training from its first start to its end."""

    def __init__(self, draw, starts, work, disk, resize, counts):
        self.draw = draw  # random.Random
        self.starts = starts
        self.work = work
        self.disk = disk
        self.out = disk / "out"
        self.resize = resize  # resize(KiB) of the disk
        self.counts = counts
        self.log = disk.parent / "log"
        self.worlds = set()
        self.damaged = None

    def argv(self):
        return resuming.arguments(self.work, self.out, *FLAGS)

    def run(self):
        """Starts until it has finished."""
        keeps_world = self.draw.random() < 0.7
        while not (self.out / "final").exists():
            world = 2 if keeps_world else self.draw.choice([1, 2])
            between = self.draw.choice([self.damage, self.copy_links, self.leave_rests, None, None])
            if between and self.out.exists():
                self.count(between)
            self.worlds.add(world)
            self.starts.start(self.argv(), world, self.log)
            fault = self.draw.choice(
                [self.kill_all, self.kill_one, self.ask_to_stop, self.suspend, self.fill_disk, self.start_again, None]
            )
            time.sleep(self.draw.uniform(2, 9))
            if fault:
                self.count(fault)
            codes = self.starts.wait()
            self.resize(SIZE)
            was_killed = fault in (self.kill_all, self.kill_one) or -signal.SIGTERM in codes  # before it trained
            ends = self.log.read_text().splitlines()[-1:]
            lines = ("another process writes there", "No space left")  # the second start was first; a full disk
            is_refused = fault in (self.start_again, self.fill_disk) and any(x in str(ends) for x in lines)
            if not was_killed and not is_refused and codes != [0] * world:
                self.fail(f"a start ended with {codes}, {fault.__name__ if fault else 'nothing'} beside it")
            self.check_folders()

    def check_folders(self):
        """Every checkpoint is complete, but one that was damaged here; copies that were put aside go."""
        for folder in checkpoints.checkpoints(self.out):
            problem = checkpoints.open_checkpoint(folder)[1]
            if problem and folder.name != self.damaged:
                self.fail(f"{folder}: {problem}")
        for pattern in ("copied_*", "damaged_*"):
            for path in self.out.glob(pattern):
                common.remove(path)

    def count(self, fault):
        self.counts[fault.__name__] += 1
        fault()

    def fail(self, reason):
        print(self.log.read_text()[-6000:], file=sys.stderr)
        sys.exit(f"soak: {reason}")

    # --- while it trains ---

    def kill_all(self):
        self.starts.kill()

    def kill_one(self):
        """The other one has to end by itself."""
        self.signal(self.draw.choice(self.starts.pids), signal.SIGKILL)

    def ask_to_stop(self):
        self.starts.kill(signal.SIGTERM)

    def suspend(self):
        """A rank and its workers, for a moment: it goes on."""
        pid = self.draw.choice(self.starts.pids)
        self.signal(pid, signal.SIGSTOP)
        time.sleep(2)
        self.signal(pid, signal.SIGCONT)
        self.starts.kill(signal.SIGTERM)

    def fill_disk(self):
        """For two seconds; checkpoints are left out meanwhile."""
        used = shutil.disk_usage(self.disk).used // 1024
        self.resize(min(used + self.draw.choice([0, 100, 400]), SIZE))
        time.sleep(2)
        self.resize(SIZE)
        self.starts.kill(signal.SIGTERM)

    def start_again(self):
        """Beside the first one, unless that has just ended."""
        with Starts() as second:
            log = self.log.with_name("second")
            log.unlink(missing_ok=True)
            second.start(self.argv(), 1, log)
            codes = second.wait()
        lines = log.read_text()
        if "another process writes there" not in lines:
            self.worlds.add(1)  # it was first, or came behind the end of the other one
            if codes != [0] or self.is_running():
                print(lines, file=sys.stderr)
                self.fail(f"a second start ended with {codes}")
        self.starts.kill(signal.SIGTERM)

    def is_running(self):
        """Whether a rank of the first start is."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in self.starts.pids)
        return False

    def signal(self, pid, number):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(pid, number)

    # --- between two starts ---

    def damage(self):
        """A byte of the newest checkpoint."""
        for folder in checkpoints.checkpoints(self.out)[:1]:
            resuming.spoil(folder)
            self.damaged = folder.name

    def copy_links(self):
        """As copying without links does."""
        latest = self.out / "latest"
        if latest.is_symlink() and latest.exists():
            target = latest.resolve()
            latest.unlink()
            shutil.copytree(target, latest)

    def leave_rests(self):
        (self.out / ".step_00000099.building").mkdir(parents=True, exist_ok=True)
        (self.out / ".step_00000099.building" / "half").write_text("half")

    # --- in the end ---

    def compare(self, whole):
        """With the calm run."""
        if self.worlds == {2}:
            if resuming.rows(self.out) != resuming.rows(whole):
                self.fail("other metrics than the calm run's")
            names = [f"step_{STEPS:08d}", "final"]
            apart = [
                x for name in names for x in resuming.different(self.out / name, whole / name) if "run.json" not in x
            ]
            if apart:
                self.fail(f"other than the calm run: {apart[:5]}")
            self.counts["lives on two ranks, equal to the last bit"] += 1
            return
        apart = training.furthest(*(training.weights(run / "final") for run in (self.out, whole)))
        if apart > 1e-3:
            self.fail(f"other weights than the calm run's: {apart:.2g} of a tensor's norm")
        ours, theirs = ([row["loss"] for row in resuming.rows(run)] for run in (self.out, whole))
        if len(ours) != len(theirs) or max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) > 1e-5:
            self.fail("other losses than the calm run's")
        self.counts["lives on one and two ranks, equal to rounding"] += 1


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def soak(folder, minutes, seed):
    """{fault: how often}; ends the program at the first difference."""
    draw = random.Random(seed)
    counts = Counter()
    work = folder / "work"
    work.mkdir()
    training.write_workspace(work)
    with Starts() as starts:
        starts.run(resuming.arguments(work, folder / "whole", *FLAGS), 2, folder / "log")
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end or not counts:
            with tiny.small_disk(folder / f"disk_{len(list(folder.glob('disk_*')))}", SIZE) as (disk, resize):
                life = Life(draw, starts, work, disk, resize, counts)
                life.run()
                life.compare(folder / "whole")
    return counts


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        counts = soak(Path(folder), args.minutes, args.seed)
    lines = [["what happened", "times"]]
    lines += [[name.replace("_", " "), str(count)] for name, count in sorted(counts.items())]
    print(common.format_table(lines))


if __name__ == "__main__":
    main(parse_args())
