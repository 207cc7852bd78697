"""Processes: joining the process group, results shared by all ranks, lost ranks, signals.

A command runs as `ranks.run_watched(main, args)` and begins with `ranks.start_distributed(...)`. From then on a rank
that dies, hangs or fails ends all others within seconds, with a line that names it.
"""

import atexit
import contextlib
import ctypes
import datetime
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.utils.file_baton import FileBaton

from core import claims, common, waits

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TASKS = {  # variables with the number of tasks that these start at once; shells of sbatch and salloc have none of them
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
try_acquire = FileBaton.try_acquire
LOCK_PATIENCE = 5  # seconds
USUAL_SECONDS = 20 * 60  # in which ranks join, and hear of each other, however long a collective may take
TOKEN_SECONDS = 10  # in which a connection has to say that it is of this run
MORE_STRANGERS = 64  # beyond the number of ranks, that are listened to at a time


def start_distributed(timeout, local_rank=-1):
    """Join the process group that the variables of a launcher or a service describe, or be a group of one.

    timeout: minutes that a collective may take. local_rank: the launcher's flag, -1 = from the variables. Returns the
    device of this rank.
    """
    check_variables()
    if "RANK" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        os.environ.update(zip((*VARIABLES, "LOCAL_RANK"), ("0", "1", "127.0.0.1", port, "0"), strict=True))
    cuda = torch.cuda.is_available()
    if local_rank < 0:  # some services set RANK alone: ranks are dealt to a node's devices in turn
        local_rank = int(os.environ["RANK"]) % torch.cuda.device_count() if cuda else 0
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    # DeepSpeed builds its C++ helper with the ninja that it finds: the environment's own, activated or not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as way:
            # gloo listens at the address of the host's name, on many systems the loopback's: rather towards rank 0.
            way.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing
            for name, addresses in psutil.net_if_addrs().items():
                if way.getsockname()[0] in (entry.address for entry in addresses):
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    timeout = datetime.timedelta(minutes=timeout)
    # Groups that DeepSpeed and device meshes make name no timeout: they take these defaults, not that of the world.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    FileBaton.try_acquire = acquire_build_lock
    usual = min(timeout.total_seconds(), USUAL_SECONDS)
    waits.watch(timeout.total_seconds() + 60, end_rank)  # collectives name a rank, and come first
    import deepspeed  # here and below: it is slow and prints, and the scripts that only read a target do without it

    try:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        with waits.waiting_for(f"the other ranks at {place}", usual + 60):
            deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout, verbose=False)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        fail_to_join(error)
    if dist.get_world_size() > 1:
        unlink_buffers()
    if dist.get_world_size() > 1 and not Watch.running:
        Watch.running = Watch(max(usual / 2, 10))  # names a rank before a collective gives up
    return device


def unlink_buffers():
    """Drop the names of the memory that DeepSpeed's ranks share on CPUs: 67 MB a rank that it would never free."""
    dist.barrier()  # every rank has mapped it
    rank = dist.get_rank()
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{rank}"):
        path.unlink(missing_ok=True)


def fail_to_join(error):
    """End the program because of what torch raises when this rank does not find the others."""
    port = os.environ["MASTER_PORT"]
    place = f"{os.environ['MASTER_ADDR']}:{port}"
    reason = str(error).splitlines()[0]
    if "EADDRINUSE" in reason:
        common.fail(
            f"port {port} is in use, by another training for example: give another one with --master_port (deepspeed, "
            "torchrun) or MASTER_PORT"
        )
    common.fail(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot join the others at {place}: {reason}")


def check_variables():
    """End the program if the environment says that there are other ranks, but not how to join them."""
    remedy = f"set all of {', '.join(VARIABLES)}, or none of them for one rank"
    missing = [name for name in VARIABLES if name not in os.environ]
    if "RANK" in missing:
        for name, launcher in TASKS.items():
            if os.environ.get(name, "1") != "1":
                common.fail(
                    f"{launcher} has started {os.environ[name]} tasks ({name}), but {', '.join(missing)} are not set: "
                    "start one task a node with deepspeed or torchrun in it, or set them (docs/distributed.md)"
                )
        if os.environ.get("WORLD_SIZE", "1") != "1":
            common.fail(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} are not set: {remedy}")
        return
    if missing:
        common.fail(f"RANK is set, but not {', '.join(missing)}: {remedy}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            common.fail(f"{name} is {os.environ[name]!r}, which is not a number: {remedy}")
    if int(os.environ["MASTER_PORT"]) > 65535:
        common.fail(f"MASTER_PORT is {os.environ['MASTER_PORT']}: ports end at 65535")
    rank = os.environ["RANK"]
    world = os.environ["WORLD_SIZE"]
    if int(rank) >= int(world):
        common.fail(f"RANK is {rank}, but WORLD_SIZE is {world}: ranks are counted from 0 to {int(world) - 1}")


def acquire_build_lock(baton):
    """torch's FileBaton.try_acquire, except that the lock of a process which was killed is taken over.

    torch takes the lock at each start, not only to build, and would wait without end for a process that was killed
    then. Returns whether this process has the lock; if not, another one has built.
    """
    lock = Path(baton.lock_file_path)
    checked = time.monotonic()
    while not try_acquire(baton):
        time.sleep(0.1)
        if not lock.exists():
            return False
        if time.monotonic() - checked > LOCK_PATIENCE:
            checked = time.monotonic()
            if is_abandoned(lock):
                lock.unlink(missing_ok=True)
                print(f"{lock} was left by a build that was interrupted: removed", file=sys.stderr)
    return True


def is_abandoned(lock):
    """Whether a lock's process is gone: none here has the file open, or, if it may be elsewhere, 15 minutes passed."""
    with contextlib.suppress(FileNotFoundError):
        before = lock.stat()
        if time.time() - before.st_mtime > 900:
            return True
        if is_open(lock) or not claims.is_local(lock):
            return False
        time.sleep(1)  # a process that closes its lock removes it at once
        return lock.stat().st_mtime_ns == before.st_mtime_ns and not is_open(lock)
    return False


def is_open(path):
    """Whether a process of this machine has a file open."""
    open_files = (process.info["open_files"] or [] for process in psutil.process_iter(["open_files"]))
    return any(file.path == os.path.realpath(path) for files in open_files for file in files)


class Watch:
    """Ends this rank when another one dies, hangs or fails, with a line that names that one.

    Each rank has a connection to rank 0 and sends every second the last words that count once it is gone. The kernel
    closes the connection of a process that dies, whatever the cause. Rank 0 then ends with the same words, and so do
    the others. A rank that ends as it should leaves an empty line. A peer without the token of the run is ignored.
    """

    running = None

    def __init__(self, limit):
        self.limit = limit  # seconds of silence after which a peer counts as hanging
        self.peers = []
        self.strangers = set()  # connections that have not said the token yet
        self.sending = threading.Lock()
        self.ending = threading.Lock()  # never released: the first reason counts
        self.me = f"rank {dist.get_rank()} (host {socket.gethostname()}, pid {os.getpid()})"
        self.last_words = f"{self.me} has died: it was killed, or its own output says why"
        server = None
        address = {"port": None, "token": secrets.token_hex()}
        if dist.get_rank() == 0:
            both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
            server = socket.create_server(("", 0), backlog=4096, **both)
            server.settimeout(1)
            address["port"] = server.getsockname()[1]
        address = on_first_rank(lambda: address)
        self.token = address["token"]
        atexit.register(self.send, "")
        os.register_at_fork(after_in_child=self.close_after_fork)
        threading.Thread(target=self.heartbeat, args=[server, address["port"]], daemon=True).start()

    def heartbeat(self, server, port):
        """Connect to rank 0, or on rank 0 accept the others, and repeat this rank's last words every second."""
        if not server and not self.connect(port):
            return
        while True:
            if server:
                self.accept(server)
            else:
                time.sleep(1)
            self.send()

    def accept(self, server):
        """Listen to a peer that connects within a second, unless too many strangers are listened to."""
        try:
            peer, _ = server.accept()
            if len(self.strangers) < dist.get_world_size() + MORE_STRANGERS:
                self.strangers.add(peer)
                self.start_listening(peer, unknown=True)
            else:
                peer.close()
        except TimeoutError:
            pass
        except (OSError, RuntimeError):  # too many open files or threads, for a moment
            time.sleep(1)

    def connect(self, port):
        """Connect to rank 0. Returns whether that succeeds."""
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
            peer.sendall(f"{self.token}\n".encode())
        except OSError as error:
            print(
                f"{self.me} cannot reach port {port} of {os.environ['MASTER_ADDR']} ({error}): "
                "a rank that is lost will show only after dist_timeout",
                file=sys.stderr,
            )
            return False
        self.start_listening(peer)
        return True

    def start_listening(self, peer, unknown=False):
        threading.Thread(target=self.listen, args=[peer, unknown], daemon=True).start()

    def listen(self, peer, unknown=False):
        """Read a peer's words until its connection ends, or until it is silent for `limit` seconds."""
        words = ""
        try:
            if unknown and not self.is_of_this_run(peer):
                peer.close()
                return
            peer.settimeout(self.limit)
            lines = peer.makefile(errors="replace")
            self.peers.append(peer)
            peer.sendall(f"{self.last_words}\n".encode())
            while line := lines.readline(10000):
                words = line
        except OSError as error:  # or a reset, as the end left something unread
            if isinstance(error, TimeoutError):
                name = words.partition(")")[0]
                words = f"{name}) has not been heard of for {self.limit:.0f} s: it hangs or cannot be reached"
        if words.startswith("rank"):  # not the empty line
            self.end(words.strip())

    def is_of_this_run(self, peer):
        """Whether a stranger says the token within TOKEN_SECONDS."""
        end = time.monotonic() + TOKEN_SECONDS
        expected = f"{self.token}\n".encode()
        said = b""
        try:
            while said != expected and expected.startswith(said):
                peer.settimeout(max(end - time.monotonic(), 0.001))
                part = peer.recv(len(expected) - len(said))
                if not part:
                    return False
                said += part
            return said == expected
        except OSError:
            return False
        finally:
            self.strangers.discard(peer)

    def close_after_fork(self):
        """In a forked process: close the connections, or they would stay open when this rank dies."""
        for peer in self.peers:
            with contextlib.suppress(OSError):
                os.close(peer.fileno())

    def send(self, last_words=None):
        """Send this rank's last words, replaced by the given ones if any."""
        with self.sending:
            if last_words is not None:
                self.last_words = last_words
            for peer in self.peers:
                with contextlib.suppress(OSError):  # gone: `listen` sees it
                    peer.sendall(f"{self.last_words}\n".encode())

    def end(self, reason):
        """End this rank, and on rank 0 all others."""
        self.ending.acquire()
        self.send(reason)
        sys.stdout.flush()
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def end_rank(reason):
    """End this rank, and with it all others."""
    if Watch.running:
        Watch.running.end(reason)
    sys.stdout.flush()
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def exit_code(error):
    """The exit code of a program that ends with this exception."""
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(bool(error.code))


def run_watched(main, args):
    """Run main(args). A rank that fails says why, as it would alone; the others end with a line that names it."""
    try:
        with common.disk_errors_in_a_line():
            main(args)
    except BaseException as error:
        watch = Watch.running
        code = exit_code(error)
        if not watch or not code:
            raise
        if not isinstance(error, SystemExit):
            time.sleep(1)  # if this follows from another rank's death, the watch has seen that, and ends this one
            print(f"{watch.me}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        watch.ending.acquire()
        watch.send(f"{watch.me} ended by {error!r}: its own output says why")
        time.sleep(2)  # for ranks that fail for the same reason to say so
        sys.stdout.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals():
    """A list that gets the name of each signal that asks for an end meanwhile: SIGTERM, SIGINT or SIGUSR1.

    The training ends when its step is done. A second Ctrl-C ends it at once; a wait ends it after waits.GRACE.
    """
    asked = []

    def note(number, frame):
        asked.append(signal.Signals(number).name)
        waits.ask_for_end(asked[0])
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = [signal.signal(number, note) for number in waits.STOP_SIGNALS]
    try:
        yield asked
    finally:
        waits.ask_for_end(None)
        for number, handler in zip(waits.STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def keep_freed_memory():
    """On CPUs: have glibc keep what is freed. It would give large blocks back and page them in anew in every step."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check_disk(name, folder):
    """End the program if DeepSpeed cannot keep tensors in `folder`, which the user gave as `name`."""
    try:
        tempfile.TemporaryFile(dir=folder or os.devnull).close()
    except OSError as error:
        common.fail(f"{name} {folder} cannot be written: {error.strerror}; give a folder on the NVMe disk")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        common.fail(f"{name} {folder}: DeepSpeed's async_io needs libaio with its headers (Debian: libaio-dev)")


def gather(value):
    """Every rank's value, in the order of the ranks. All ranks call it; values are pickled."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@dataclass
class Outcome:
    """What rank 0 tells the others about work that they wait for."""

    value: object = None
    exit_code: object = 1  # 0: the value counts


def on_first_rank(work):
    """The result of work() on rank 0, on all ranks. All wait for it; if it ends the program, all end."""
    outcome = Outcome()
    if dist.get_rank() == 0:
        try:
            outcome = Outcome(work(), exit_code=0)
        except SystemExit as stop:
            outcome.exit_code = stop.code
            raise
        finally:
            dist.broadcast_object_list([outcome])
    else:
        received = [None]
        dist.broadcast_object_list(received)
        outcome = received[0]
        if outcome.exit_code:
            sys.exit(outcome.exit_code)
    return outcome.value


@contextlib.contextmanager
def only_writer(name, folder):
    """`claims.only_writer` on rank 0 for all ranks."""
    with contextlib.ExitStack() as claim:
        on_first_rank(lambda: claim.enter_context(claims.only_writer(name, folder)))
        yield


def scatter(values=None):
    """Of the values on rank 0, one for each rank, this rank's. All ranks call it; values are pickled."""
    received = [None]
    dist.scatter_object_list(received, values)
    return received[0]


def any_rank(device, *flags):
    """Of each flag whether it is true on any rank. One all_reduce."""
    votes = torch.tensor([bool(flag) for flag in flags], dtype=torch.float32, device=device)
    dist.all_reduce(votes)
    return [count > 0 for count in votes.tolist()]


def fail_together(message):
    """End the program on all ranks with one line, of rank 0."""
    on_first_rank(lambda: common.fail(message))


def check_shared(name, folder, patience=10):
    """End the program if not all ranks see the same folder within `patience` seconds; the user gave it as `name`."""

    def write():
        handle, path = tempfile.mkstemp(".building", ".seen-by-all-", folder)
        os.close(handle)  # mounted storage shows a file to other nodes when it is closed
        return path

    path = on_first_rank(write)
    until = time.monotonic() + patience
    while not (seen := os.path.exists(path)) and time.monotonic() < until:
        time.sleep(0.2)
    hosts = gather("" if seen else socket.gethostname())
    if dist.get_rank() == 0:
        os.unlink(path)
    if missing := ", ".join(sorted({host for host in hosts if host})):
        fail_together(f"{name} {folder} is another folder on {missing}: give one that all nodes share")


def on_each_node(work):
    """Run work() on the first rank of each node, then on the others: they find what it downloaded."""
    for turn in (True, False):
        if turn == (os.environ["LOCAL_RANK"] == "0"):
            result = work()
        dist.barrier()
    return result
