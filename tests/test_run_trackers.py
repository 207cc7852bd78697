"""The trackers with their real libraries, offline: values read back, resumed runs, trackers that fail or hang."""

import contextlib
import importlib.metadata
import json
import os
import pty
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
from google.protobuf.message import DecodeError

import train_eagle3
from core import run_record
from helpers import tiny, training
from helpers.training import TIMES
from helpers.training import metrics as rows_of

TRACKERS = ["swanlab", "wandb", "tensorboard", "mlflow", "trackio"]
OFFLINE = {"SWANLAB_MODE": "offline", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
ACCOUNTS = ("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_")  # variables that would lead to one


FLAGS = ("--ttt_length", 2, "--eval_steps", 2, "--save_steps", 2, "--scheduler_type", "constant", "--run_name", "tiny",
         "--num_workers", 0)  # fmt: skip


def arguments(work, output, *flags):
    return training.arguments(work, output, *FLAGS, *flags)


def train(work, output, *flags):
    training.run(work, output, *FLAGS, *flags)


def offline(patch, **more):
    """Only these variables of trackers; what is set meanwhile is undone as well."""
    for name in [name for name in os.environ if name.startswith(ACCOUNTS)] + ["TRACKIO_DIR"]:
        patch.delenv(name, raising=False)
    for name, value in (OFFLINE | more).items():
        patch.setenv(name, str(value))


# --- what each of them holds: {(step, name): [values]} ---


def newest(paths):
    return max(paths, key=lambda path: path.stat().st_mtime)


def swanlab_values(logs):
    """Of the newest start's folder."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found, reader, record = defaultdict(list), DataStoreReader(), Record()
    reader.open(str(newest(logs.glob("run-*/run-*.swanlab"))))
    while (data := reader.scan()) is not None:
        record.ParseFromString(data)
        if record.HasField("scalar") and not record.scalar.key.startswith("__swanlab__"):  # what it measures itself
            found[record.scalar.step, record.scalar.key].append(record.scalar.value.number)
    return found


def swanlab_local_values(logs):
    """Of the newest start: a table says in which folder each name's values are, a line each."""
    found = defaultdict(list)
    with sqlite3.connect(logs / "runs.swanlab") as base:
        starts = base.execute("SELECT run_id, experiment.id FROM experiment ORDER BY experiment.id").fetchall()
        assert len(starts) == 2
        folder, key = starts[-1]
        names = dict(base.execute("SELECT folder, name FROM tag WHERE experiment_id = ?", [key]))
    for path in (logs / folder / "logs").glob("*/*.log"):
        for row in map(json.loads, path.read_text().splitlines()):
            found[row["index"], names[path.parent.name]].append(row["data"])
    return found


def wandb_values(logs):
    """Of the newest start's folder: a log of LevelDB's form, which has blocks of 32 KiB and a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, record, part, at = defaultdict(list), Record(), b"", 7
    data = newest(logs.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            record.ParseFromString(part)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for name in items.keys() - {"_step", "_runtime", "_timestamp"}:
                found[int(items["_step"]), name].append(json.loads(items[name]))
            part = b""
    return found


def tensorboard_values(logs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, found = EventAccumulator(str(*logs.glob("tiny-*"))).Reload(), defaultdict(list)
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found[event.step, name].append(event.value)
    return found


def mlflow_values(logs):
    from mlflow import MlflowClient

    client, found = MlflowClient(f"sqlite:///{logs}/mlflow.db"), defaultdict(list)
    (run,) = client.search_runs([client.get_experiment_by_name("eagle3").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["ttt_length"] == "2"
    for name in run.data.metrics:
        for row in client.get_metric_history(run.info.run_id, name):
            found[row.step, name].append(row.value)
    return found


def trackio_values(logs):
    found = defaultdict(list)
    with sqlite3.connect(logs / "trackio" / "eagle3.db") as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({run for run, *_ in rows}) == 1 and rows[0][0].startswith("tiny-")
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            found[step, name].append(value)
    return found


def check_values(name, output):
    """A tracker has every value of metrics.jsonl, once, and no others."""
    expected, until = {}, time.monotonic() + 10
    for row in rows_of(output):
        expected |= {(row["step"], key): value for key, value in run_record.tracked(row).items()}
    values = {}
    while values.keys() != expected.keys() and time.monotonic() < until:  # some write in a process of their own
        time.sleep(0.05)
        with contextlib.suppress(DecodeError, struct.error):  # it is in the middle of a record
            values = globals()[f"{name}_values"](output / "logs")
    assert len(expected) > 50 and values.keys() == expected.keys(), values.keys() ^ expected.keys()
    for key, value in expected.items():
        assert len(values[key]) == 1, (key, values[key])
        if not key[1].endswith(TIMES):
            assert values[key][0] == pytest.approx(value, rel=1e-6), key


@pytest.fixture(scope="module")
def resumed(work, tmp_path_factory):
    """A run of all trackers that lost what it did behind step 2, and was resumed; mlflow's server left at step 2."""
    from mlflow import MlflowClient

    log_batch, output = MlflowClient.log_batch, tmp_path_factory.mktemp("resumed") / "out"

    def away(client, run, metrics=(), **options):
        if metrics and metrics[0].step == 2:
            raise ConnectionError("the server is away")
        log_batch(client, run, metrics, **options)

    with pytest.MonkeyPatch.context() as patch:
        offline(patch)
        flags = work, output, "--report_to", ",".join(TRACKERS)
        with patch.context() as server:
            server.setattr(MlflowClient, "log_batch", away)
            train(*flags, "--total_steps", 3)
        shutil.rmtree(output / "step_00000003")
        shutil.rmtree(output / "final")
        time.sleep(1)  # folders are named by the second
        train(*flags, "--total_steps", 5, "--resume")
    assert [row["step"] for row in rows_of(output)] == [1, 2, 2, 3, 3, 4, 4, 5, 5]
    return output


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_is_in_the_tracker_without_gap_or_duplicate(resumed, name):
    check_values(name, resumed)


@pytest.mark.slow
def test_killed_and_resumed_run_is_in_every_tracker_without_gap_or_duplicate(work, tmp_path):
    """kill -9 behind step 5, two rows after the checkpoint of step 4."""
    output, program = (
        tmp_path / "out",
        (
            "import os, signal, train_eagle3\nfrom core import optimization\n"
            "step, done = optimization.optimizer_step, []\n"
            "def counted(*args):\n"
            "    if len(done) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    done.append(1); return step(*args)\n"
            "optimization.optimizer_step = counted\n"
            "train_eagle3.main(train_eagle3.parse_args())"
        ),
    )
    argv = arguments(work, output, "--report_to", ",".join(TRACKERS), "--total_steps", 7)
    with pytest.MonkeyPatch.context() as patch:
        offline(patch)
        given = {"cwd": tiny.REPOSITORY, "timeout": 300, "capture_output": True, "text": True, "check": False,
                 "env": tiny.environment()}  # fmt: skip
        assert subprocess.run([sys.executable, "-c", program, *argv], **given).returncode == -9
        done = subprocess.run([sys.executable, "train_eagle3.py", *argv, "--resume"], **given)
        assert done.returncode == 0 and "fails" not in done.stderr, done.stderr[-3000:]
    for name in TRACKERS:
        check_values(name, output)


@pytest.mark.parametrize("name", [*TRACKERS, "swanlab_local"])
def test_an_evaluation_made_up_for_is_in_the_tracker(record, tmp_path, monkeypatch, name):
    """Its row is of the checkpoint's own step, and comes after the resumption."""
    offline(monkeypatch)
    if name == "swanlab_local":
        pytest.importorskip("swanboard", reason="swanboard, of swanlab's local mode, is not installed")
        monkeypatch.setenv("SWANLAB_MODE", "local")
        monkeypatch.setenv("SWANLAB_LOG_DIR", str(tmp_path))  # it sets that itself, which is undone so
    monkeypatch.setattr(run_record, "TRACKER_SECONDS", 60)
    for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it keeps the folder that it was imported with
    for step in (0, 2):
        if step:
            time.sleep(1)  # folders are named by the second
        run = record(run_record.TRACKERS[name.partition("_")[0]], step=step, log_dir=tmp_path / "logs", run_name="tiny")
        if step:
            run.row("validation", step, 0.2, {"loss": 5.0, "passes": 4})
        for later in range(step + 1, step + 4):
            run.row("train", later, 0.1, {f"loss_{i}": float(later * i) for i in range(11)})
        run.close()
    check_values(name, tmp_path)


def test_trainings_that_share_a_log_dir_hide_nothing_of_one_another(tmp_path):
    """Neither with a name nor without one; the longer one came first."""
    for name in (None, "tiny"):
        for key, count in (("0123456789abcdef", 5), ("fedcba9876543210", 3)):
            args = SimpleNamespace(run_name=name, log_dir=tmp_path)
            log, close = run_record.open_tensorboard(args, settings_of() | {"run_id": key})
            for step in range(1, count + 1):
                log({"train/loss": float(count * step)}, step)
            close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in tmp_path.iterdir():
        events = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
        found[folder.name] = [(event.step, event.value) for event in events]
    five, three = ([(step, float(count * step)) for step in range(1, count + 1)] for count in (5, 3))
    assert found == {"0123456789abcdef": five, "fedcba9876543210": three, "tiny-0123456789abcdef": five,
                     "tiny-fedcba9876543210": three}  # fmt: skip


# --- accounts, as far as they can be known without one ---


def test_wandbs_server_is_not_sent_the_steps_that_it_has(tmp_path, monkeypatch):
    """Its client stood in for: it says which step is next, and would warn for each one before that."""
    sent, given = [], {}
    run = SimpleNamespace(step=3, log=lambda values, step: sent.append(step), finish=lambda: sent.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: given.update(options) or run))
    offline(monkeypatch, WANDB_PROJECT="mine")
    args = SimpleNamespace(run_name="name", log_dir=tmp_path / "logs")
    log, close = run_record.open_wandb(args, settings_of(2))
    for step in range(1, 6):
        log({"train/loss": 1.0}, step)
    close()
    assert sent == [3, 4, 5, "end"] and (tmp_path / "logs").is_dir()
    assert given["id"] == "0123456789abcdef" and given["resume"] == "allow" and given["project"] == "mine"


def test_trackios_server_is_not_sent_the_steps_that_it_has(tmp_path, monkeypatch):
    sent, given = [], {}
    run = SimpleNamespace(_initial_last_step=2, log=lambda values, step: sent.append(step), finish=None)
    fake = SimpleNamespace(init=lambda **options: given.update(options) or run)
    storage = SimpleNamespace(SQLiteStorage=SimpleNamespace(get_logs=lambda *_, **__: []))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", storage)
    offline(monkeypatch, TRACKIO_SPACE_ID="me/space")
    log, _ = run_record.open_trackio(SimpleNamespace(run_name=None, log_dir=tmp_path), settings_of(2))
    for step in range(1, 6):
        log({"train/loss": 1.0}, step)
    assert sent == [3, 4, 5] and given["name"] == "0123456789abcdef" and given["resume"] == "allow"


def test_mlflow_takes_the_run_that_a_service_has_begun(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    offline(monkeypatch, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/elsewhere.db")
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    begun = client.create_run(client.create_experiment("job")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", begun)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "job")
    for step in (1, 2):  # the second time it is resumed, and offered both
        args = SimpleNamespace(run_name=None, log_dir=tmp_path / "logs")
        log, close = run_record.open_mlflow(args, settings_of(step - 1))
        for row in range(1, step + 1):
            log({"train/loss": 1.0 / row}, row)
        close()
    assert [(x.step, x.value) for x in client.get_metric_history(begun, "train/loss")] == [(1, 1.0), (2, 0.5)]
    assert client.get_run(begun).info.status == "FINISHED" and not (tmp_path / "logs" / "mlflow.db").exists()


# --- trackers that fail or hang ---


def settings_of(step=0):
    return {"run_id": "0123456789abcdef", "starts_behind_step": step, "flags": {"ttt_length": 2}}


@pytest.fixture
def record(work, tmp_path, monkeypatch):
    """record(*openers, step=0): a Record in tmp_path with these trackers, named t0, t1, ..."""
    if not train_eagle3.dist.is_initialized():
        train_eagle3.dist.init_process_group("gloo", rank=0, world_size=1, store=train_eagle3.dist.HashStore())
    monkeypatch.setattr(run_record, "TRACKER_SECONDS", 0.5)
    left = []
    noted = lambda *call: left.append(call) if call[0] is run_record.leave else None  # noqa: E731 (tqdm registers too)
    monkeypatch.setattr(run_record.atexit, "register", noted)

    def make(*openers, step=0, **more):
        names = [f"t{i}" for i in range(len(openers))]
        for name, opener in zip(names, openers, strict=True):
            monkeypatch.setitem(run_record.TRACKERS, name, opener)
        given = {"output_dir": tmp_path, "log_dir": tmp_path, "report_to": names, "run_name": None}
        args = SimpleNamespace(**given | more)
        record = run_record.Record(args, settings_of(step) | {"continues": str(tmp_path) if step else None}, 9)
        record.left = left
        return record

    return make


def collecting(rows):
    """An opener whose tracker takes everything into `rows`; `closed` at last."""
    return lambda args, settings: (lambda values, step: rows.append((step, values)), lambda: rows.append("closed"))


def refuse(*args):
    raise ConnectionError("no account,\n   no run")


def test_trackers_that_fail_are_named_once_and_the_others_go_on(record, capsys):
    rows = []
    run = record(refuse, collecting(rows), lambda *_: (refuse, refuse), lambda *_: (print, refuse), lambda *_: 1 / 0)
    for step in (1, 2):
        run.row("train", step, 0.1, {"loss": 2.0 / step, "grad_norm": None})
    run.close()
    assert rows == [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0}), "closed"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "fails" in line]
    failed = "fails, training goes on without it: no account, no run"
    assert sorted(lines) == [
        *(f"t{i} {failed}" for i in (0, 2, 3)),
        "t4 fails, training goes on without it: division by zero",
    ]
    assert not run.left


@pytest.mark.parametrize("name", run_record.TRACKERS)
def test_a_tracker_that_is_not_installed_says_which_package_is(name, monkeypatch, capsys):
    """Its package, and one that it needs itself, cannot be imported."""

    class Missing:
        def find_spec(self, module, path=None, target=None):
            if module.split(".")[0] == name:
                raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    for module in list(sys.modules):
        if module.split(".")[0] == name:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    args = SimpleNamespace(run_name=None, log_dir="logs")
    tracker = run_record.Tracker(name, args, {"run_id": "0", "starts_behind_step": 0, "flags": {}}, [])
    tracker.join(timeout=60)
    line = capsys.readouterr().err
    assert f"{name} fails, training goes on without it: " in line and line.endswith(f": pip install {name}\n")


@pytest.mark.parametrize("version", [None, "0.1.6"])
def test_swanlabs_local_mode_fails_with_a_line(record, monkeypatch, capsys, version):
    """Without its board, or with another version of it, swanlab itself says nothing and writes nothing."""
    offline(monkeypatch, SWANLAB_MODE="local")
    known = importlib.metadata.distribution

    def distribution(name):
        if name != "swanboard":
            return known(name)
        if not version:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=version)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(run_record, "TRACKER_SECONDS", 60)
    run = record(run_record.open_swanlab)
    run.row("train", 1, 0.1, {"loss": 1.0})
    run.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "fails" in line]
    assert line == "t0 fails, training goes on without it: SWANLAB_MODE=local needs pip install 'swanlab[dashboard]'"


def test_training_with_a_tracker_that_fails_ends_well(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run_record.TRACKERS, "tensorboard", refuse)
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    train(work, tmp_path / "out", "--total_steps", 1, "--report_to", "tensorboard,trackio")
    printed = capsys.readouterr().err
    assert "tensorboard fails, training goes on without it: no account, no run" in printed
    assert "trackio fails, training goes on without it: " in printed and (tmp_path / "out" / "final").exists()


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_hangs_holds_nothing_up(record, monkeypatch, capsys, where):
    monkeypatch.setattr(run_record, "TRACKER_SECONDS", 1)
    rows, never = [], threading.Event()
    hang = lambda *_: never.wait(60)  # noqa: E731 (a row of the table below)
    opener = {"open": hang, "log": lambda *_: (hang, print), "close": lambda *_: (lambda *_: None, hang)}[where]
    start = time.monotonic()
    run = record(opener, collecting(rows))
    assert (time.monotonic() - start > 0.9) == (where == "open")
    start = time.monotonic()
    for step in range(1, 101):
        run.row("train", step, 0.1, {"loss": 1.0})
    assert time.monotonic() - start < 0.9, "rows do not wait"
    run.close()
    never.set()
    assert time.monotonic() - start < 5 and [row[0] for row in rows[:-1]] == [*range(1, 101)]
    printed = capsys.readouterr().err
    assert "t0: not done 1 s after the training" in printed and run.left == [(run_record.leave, 0)]
    assert ("t0 is not open after 1 s" in printed) == (where == "open")


FAILING = """
import sys, time, train_eagle3
from core import ranks, run_record, server
run_record.TRACKER_SECONDS, how = 1, sys.argv.pop(1)
def opened(args, settings):
    return lambda values, step: print("told", step), lambda: (print("closed", flush=True), time.sleep(100))
run_record.TRACKERS["trackio"] = opened
def away(*args):
    raise server.ServerFailed("the server is gone")
run_draft = train_eagle3.run_draft
def bad(*args):
    loss, *rest = run_draft(*args)
    return loss * float("nan"), *rest
if how == "server":
    train_eagle3.evaluate = away
else:
    train_eagle3.run_draft = bad
ranks.run_watched(train_eagle3.main, train_eagle3.parse_args())
"""


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("server", "error: the server is gone"),
        pytest.param("nan", "error: 2 steps in a row are not finite", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_fails_says_so_though_a_tracker_hangs(work, tmp_path, how, line):
    argv = arguments(work, tmp_path / "out", "--report_to", "trackio", "--total_steps", 3, "--max_bad_steps", 2)
    done = subprocess.run(
        [sys.executable, "-c", FAILING, how, *argv],
        cwd=tiny.REPOSITORY,
        timeout=100,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1], done.stderr[-3000:]
    assert "trackio: not done 1 s after the training" in done.stderr and "closed" in done.stdout
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_offers_the_trackers_what_is_kept(record, tmp_path):
    first, second = [], []
    run = record(collecting(first))
    for step in (1, 2, 3):
        run.row("train", step, 0.1, {"loss": 1.0 / step})
    run.row("validation", 2, 0.2, {"loss": 5.0})
    run.close()
    run = record(collecting(second), step=2)
    run.row("train", 3, 0.1, {"loss": 9.0})
    run.close()
    losses = [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]
    assert first == [*losses, (3, {"train/loss": 0.333333333}), (2, {"validation/loss": 5.0}), "closed"]
    assert second == [*losses, (2, {"validation/loss": 5.0}), (3, {"train/loss": 9.0}), "closed"]


ALONE = """
import sys, torch.distributed as dist
from types import SimpleNamespace
from core import run_record
run_record.TRACKER_SECONDS = float(sys.argv[3])
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
args = SimpleNamespace(output_dir=sys.argv[1], log_dir=sys.argv[1], run_name=None, report_to=sys.argv[2].split(","))
print("terminal", sys.stdin.isatty())
record = run_record.Record(args, {"run_id": "0123456789abcdef", "starts_behind_step": 0, "flags": {}}, 1)
record.row("train", 1, 1.0, {"loss": 1.0})
record.close()
print("the run ended", sys.stdin.isatty(), flush=True)
"""


def alone(output, names, seconds, **options):
    """A Record in a process of its own, without accounts but those in `env`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(ACCOUNTS)}
    env |= {"HOME": str(output), "PYTHONPATH": str(tiny.REPOSITORY)} | options.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", ALONE, output, names, str(seconds)], env=env, **options)


def test_nobody_is_asked_for_an_account(tmp_path):
    """On a terminal, which is where libraries ask."""
    here, there = pty.openpty()
    process = alone(tmp_path, "swanlab,wandb", 60, stdin=there, stdout=there, stderr=there, start_new_session=True)
    os.close(there)
    printed, start = b"", time.monotonic()
    while b"the run ended True" not in printed and time.monotonic() - start < 50:
        try:
            printed += os.read(here, 1000)
        except OSError:  # the other side is closed
            break
    process.kill()
    assert b"terminal True" in printed and b"the run ended True" in printed, printed.decode()
    for name in (b"swanlab", b"wandb"):
        assert name + b" fails, training goes on without it" in printed, printed.decode()


@pytest.mark.slow
def test_a_server_that_does_not_answer_holds_up_neither_the_training_nor_its_end(tmp_path):
    """The real libraries, with accounts at a server that accepts connections and is silent."""
    with socket.create_server(("127.0.0.1", 0), backlog=99) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url, "SWANLAB_API_KEY": "0" * 21, "SWANLAB_API_HOST": url,
               "SWANLAB_WEB_HOST": url, "MLFLOW_TRACKING_URI": url}  # fmt: skip
        process = alone(tmp_path, "swanlab,wandb,mlflow", 3, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and b"the run ended" in printed, errors.decode()
    assert b"mlflow is not open after 3.0 s" in errors and b"not done 3.0 s after the training" in errors
