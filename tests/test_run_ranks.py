"""Ways to start several ranks, with the same result; how they end when one dies; what their process groups wait for."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from core import ranks
from helpers import tiny, training
from helpers.training import furthest, metrics, weights

TRAINER = str(tiny.REPOSITORY / "train_eagle3.py")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


class Started:
    """Processes that run side by side, each with a file for what it prints; none is left after the test."""

    def __init__(self, folder):
        self.folder, self.marker, self.processes = folder, str(folder), []

    def add(self, *command, **variables):
        env = tiny.environment(**variables)
        with open(self.folder / f"printed_{len(self.processes)}", "w") as out:
            process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out, env=env)
        self.processes.append(process)
        return process

    def service(self, *command, world=2, **variables):
        """The ranks of a service that sets these variables and has no launcher."""
        common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": tiny.free_port()} | variables
        return [self.add(sys.executable, *command, RANK=rank, **common) for rank in range(world)]

    def printed(self):
        return [(self.folder / f"printed_{i}").read_text() for i in range(len(self.processes))]

    def wait(self, seconds):
        """Exit codes, and the lines that begin with `error:`, process by process."""
        end = time.monotonic() + seconds
        codes = [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        return codes, [[line for line in text.splitlines() if line.startswith("error:")] for text in self.printed()]

    def until(self, text, seconds=120):
        """Wait until one of the processes has printed text."""
        end = time.monotonic() + seconds
        while text not in "".join(self.printed()):
            assert time.monotonic() < end and None in [p.poll() for p in self.processes], self.printed()
            time.sleep(0.2)

    def left(self, seconds=0):
        """The processes that carry the folder's name in their command line after so many seconds at most."""
        end = time.monotonic() + seconds
        while True:
            found = []
            for process in psutil.process_iter(["cmdline", "status"]):
                words = " ".join(process.info["cmdline"] or [])
                if self.marker in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.5)


@pytest.fixture
def started(tmp_path):
    group = Started(tmp_path)
    yield group
    for process in group.left():
        process.kill()


# --- every way of starting gives the same draft ---


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny target, prepared data, and what plain `python` makes of them."""
    folder = training.write_workspace(tmp_path_factory.mktemp("launch"), validation=())
    group = Started(folder)
    group.add(sys.executable, TRAINER, *arguments(folder, folder / "plain"))
    assert group.wait(300) == ([0], [[]]), group.printed()
    return folder


def arguments(work, output, steps=3):
    few = ("--total_steps", steps, "--draft_vocab_size", 200, "--draft_global_batch_size", 4)
    return training.arguments(work, output, *few)


def train(work, started, steps=3):
    return TRAINER, *arguments(work, started.folder / "out", steps)


def check_same_as_plain(work, started):
    ours, plain = started.folder / "out", work / "plain"
    losses = [[row["loss"] for row in metrics(run)] for run in (ours, plain)]
    assert len(losses[1]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert furthest(weights(ours / "final"), weights(plain / "final")) <= 1e-5
    assert json.loads((ours / "run.json").read_text())["world_size"] == 2
    assert not started.left(10)


@pytest.mark.slow
def test_service_that_sets_the_variables_without_local_rank(work, started):
    port = tiny.free_port()
    started.service(*train(work, started), MASTER_PORT=port)
    assert started.wait(300) == ([0, 0], [[], []]), started.printed()
    check_same_as_plain(work, started)
    assert [path.name for path in Path("/dev/shm").iterdir() if str(port) in path.name] == []  # nothing stays in memory
    assert "ranks       world 2" in started.printed()[0] and "step 3/3" in started.printed()[0]
    assert not [line for line in started.printed()[1].splitlines() if line.startswith(("ranks", "step", "saved"))]


def test_variables_of_a_service_that_are_not_complete(monkeypatch, capsys):
    for name in tiny.LAUNCHERS_OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        ranks.start_distributed(1)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: RANK is set, but not MASTER_ADDR, MASTER_PORT: ")


@pytest.fixture
def namespaces(tmp_path):
    """Two network namespaces, as two hosts on a cable: [(name, address)]."""
    nodes = [(f"eagle3-{os.getpid()}-{i}", f"192.0.2.{1 + i}") for i in range(2)]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)

    try:
        ends = [f"e3{os.getpid()}n{i}" for i in range(2)]
        try:
            for name, _ in nodes:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                ends[0],
                "netns",
                nodes[0][0],
                "type",
                "veth",
                "peer",
                "name",
                ends[1],
                "netns",
                nodes[1][0],
            )
            for (name, address), end in zip(nodes, ends, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", end)
                for device in ("lo", end):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}")
        yield nodes
    finally:
        for name, _ in nodes:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def two_nodes(started, namespaces, *command):
    """One launcher on each node, started by hand."""
    (started.folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    port = tiny.free_port()
    for rank, (name, _) in enumerate(namespaces):
        started.add(
            "ip",
            "netns",
            "exec",
            name,
            DEEPSPEED,
            "--hostfile",
            started.folder / "hosts",
            "--no_ssh",
            "--node_rank",
            rank,
            "--master_addr",
            namespaces[0][1],
            "--master_port",
            port,
            *command,
        )


@pytest.mark.slow
def test_two_nodes_with_a_launcher_each(work, started, namespaces):
    """The name of this host is that of both nodes and may be the loopback's: gloo has to listen elsewhere."""
    two_nodes(started, namespaces, *train(work, started))
    codes, errors = started.wait(300)
    assert codes == [0, 0] and errors == [[], []], started.printed()
    assert "step 3/3" in started.printed()[0] and "step 3/3" not in started.printed()[1]
    check_same_as_plain(work, started)


# --- how the others end when one is lost ---

# Ranks that do nothing but wait for one another, and what may happen to rank 1 (or 0) in its fifth round.
ROUNDS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from core.common import fail
from core.ranks import run_watched, start_distributed

def main(minutes):
    start_distributed(minutes)
    for step in range(10**6):
        if dist.get_rank() == 0 and step == 5:
            print("pid", os.getpid(), flush=True)
        if dist.get_rank() == 1 and step == 5:
            print("pid", os.getpid(), flush=True)
            if sys.argv[3] == "raise":
                raise ArithmeticError("of rank 1")
            if sys.argv[3] == "fail":
                fail("the disk of rank 1 is full")
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.1)

run_watched(main, float(sys.argv[2]))
"""


def rounds(started, minutes, event):
    return "-c", ROUNDS, tiny.REPOSITORY, minutes, event, started.marker


def pids(started, count=2):
    """Process ids of the ranks, printed as they run."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = [int(line[4:]) for text in started.printed() for line in text.splitlines() if line.startswith("pid ")]
        if len(found) == count:
            return found
        time.sleep(0.2)
    raise AssertionError(started.printed())


@pytest.mark.slow
def test_rank_killed_in_training_ends_the_run_with_its_name(work, started):
    started.add(DEEPSPEED, "--num_gpus", 2, "--master_port", tiny.free_port(), *train(work, started, 10**6))
    started.until("step 3/")
    ranks = [p for p in started.left() if "--local_rank=1" in p.cmdline()]
    (rank,) = (p for p in ranks if p.parent() not in ranks)  # the others are its workers
    host = socket.gethostname()
    rank.kill()
    killed = time.monotonic()
    codes, errors = started.wait(60)
    assert codes[0] not in (0, None) and time.monotonic() - killed < 30
    assert errors[0] == [
        f"error: rank 1 (host {host}, pid {rank.pid}) has died: it was killed, or its own output says why"
    ]
    assert not started.left(15), "workers notice within seconds that their rank is gone"


@pytest.mark.slow
def test_deepspeed_launcher_ends_with_one_line_and_an_error(tmp_path):
    """Two ranks of which one has no data, through the launcher that the examples use."""
    tiny.write_target(tmp_path / "target")
    tiny.write_jsonl(tmp_path / "one.jsonl", tiny.conversations(1))
    result = subprocess.run(
        [
            "deepspeed",
            "--num_gpus",
            "2",
            "--master_port",
            str(tiny.free_port()),
            str(tiny.REPOSITORY / "train_eagle3.py"),
            "--target_model_path",
            str(tmp_path / "target"),
            "--dataset_train_split",
            str(tmp_path / "one.jsonl"),
            "--output_dir",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "training sequences for 2 ranks" in line]
    assert len(lines) == 1 and lines[0].startswith("error: 1 training sequences")


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_rank_without_a_launcher(started, lost):
    ranks = started.service(*rounds(started, 20, "none"))
    pids(started)
    ranks[lost].kill()
    codes, errors = started.wait(20)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    assert len(errors[1 - lost]) == 1 and f"rank {lost} (host" in errors[1 - lost][0], started.printed()
    assert f"pid {ranks[lost].pid}) has died" in errors[1 - lost][0]
    assert "Traceback" not in "".join(started.printed()), "what follows from the death is not what went wrong"
    assert not started.left()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_stopped_rank_is_named_within_the_timeout_and_ends_when_it_goes_on(started, lost):
    ranks = started.service(*rounds(started, 0.4, "none"), world=3)
    pids(started)
    time.sleep(14 * lost)  # longer than the silence that counts
    assert [rank.poll() for rank in ranks] == [None] * 3, started.printed()
    ranks[lost].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    others = [rank for rank in range(3) if rank != lost]
    for rank in others:
        assert ranks[rank].wait(24) == 1
    assert 10 < time.monotonic() - stopped < 24
    ranks[lost].send_signal(signal.SIGCONT)
    codes, errors = started.wait(20)
    assert codes == [1, 1, 1], started.printed()
    for rank in others:
        assert len(errors[rank]) == 1
        assert f"rank {lost} (host {socket.gethostname()}, pid {ranks[lost].pid}) has not been" in errors[rank][0]
    assert not started.left()


@pytest.mark.slow
def test_node_out_of_reach_ends_both(started, namespaces):
    """The cable is pulled: no end of a connection is seen, both sides notice the silence."""
    script = started.folder / "rounds.py"
    script.write_text(ROUNDS)
    two_nodes(started, namespaces, "--no_local_rank", script, tiny.REPOSITORY, 0.4, "none")
    pids(started)
    subprocess.run(["ip", "-n", namespaces[1][0], "link", "set", f"e3{os.getpid()}n1", "down"], check=True)
    codes, errors = started.wait(60)
    assert codes == [1, 1], started.printed()
    for node in range(2):
        assert len(errors[node]) == 1 and f"rank {1 - node} (host" in errors[node][0], started.printed()
        assert "has not been heard of for 12 s" in errors[node][0]
    assert not started.left()


@pytest.mark.slow
def test_rank_that_raises_shows_its_traceback_and_the_others_name_it(started):
    ranks = started.service(*rounds(started, 20, "raise"), world=3)
    codes, errors = started.wait(90)
    printed = started.printed()
    assert codes == [1, 1, 1], printed
    assert f"rank 1 (host {socket.gethostname()}, pid {ranks[1].pid}):\nTraceback" in printed[1]
    assert "ArithmeticError: of rank 1" in printed[1]
    for rank in (0, 2):
        assert (
            len(errors[rank]) == 1 and f"pid {ranks[1].pid}) ended by ArithmeticError('of rank 1')" in errors[rank][0]
        )
        assert "Traceback" not in printed[rank]
    assert not started.left()


@pytest.mark.slow
def test_error_of_one_rank_alone_keeps_its_line_and_its_code(started):
    ranks = started.service(*rounds(started, 20, "fail"))
    codes, errors = started.wait(90)
    assert codes == [1, 2], started.printed()
    assert errors[1] == ["error: the disk of rank 1 is full"]
    assert len(errors[0]) == 1 and f"pid {ranks[1].pid}) ended by SystemExit(2)" in errors[0][0]
    assert "Traceback" not in "".join(started.printed())


# --- what process groups wait for ---

GROUPS = """
import datetime, sys
sys.path.insert(0, sys.argv[1])
import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from core.ranks import run_watched, start_distributed

def main(minutes):
    start_distributed(minutes)
    made = {}
    def count(name):
        made[name] = len(dist.distributed_c10d._world.pg_map)
    count("world")
    dist.new_group([0, 1])
    dist.new_subgroups(2)
    count("torch")
    init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    count("mesh")
    for stage in (1, 2, 3):
        model = torch.nn.Linear(4, 4)
        config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}}
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        count(f"zero{stage}")
    groups = dist.distributed_c10d._world.pg_map
    waits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    if dist.get_rank() == 0:
        print("made", made, "waits", [wait.total_seconds() for wait in waits])

run_watched(main, float(sys.argv[2]))
"""


@pytest.mark.slow
def test_timeout_reaches_every_process_group(started):
    started.service("-c", GROUPS, tiny.REPOSITORY, 7, started.marker)
    assert started.wait(120) == ([0, 0], [[], []]), started.printed()
    (line,) = [line for line in started.printed()[0].splitlines() if line.startswith("made")]
    made = json.loads(line[5 : line.index(" waits")].replace("'", '"'))
    assert made["world"] == 1 and made["torch"] > 2 and made["mesh"] > made["torch"] and made["zero3"] > made["mesh"]
    assert line.endswith("waits [420.0]"), line
