"""Checkpoints: complete or not there, continued exactly, on other numbers of ranks, and what a run survives."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from starts import Starts

import train_eagle3
from export_eagle3 import check_draft
from prepare_data import prepare
from save_checkpoint import damage, read_state

TIMES = ("seconds", "tokens_per_second")  # of the clock
FLAGS = "--ttt_length", 3, "--draft_global_batch_size", 4, "--total_steps", 12, "--log_steps", 3, "--eval_steps", 4
FLAGS = *FLAGS, "--save_steps", 5, "--save_interval", 99, "--draft_vocab_size", 200, "--learning_rate", 3e-3


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny target, prepared data, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.write_target(folder / "target")
    tiny.write_jsonl(folder / "train.jsonl", tiny.conversations(19, 1) + tiny.conversations(3, 4))
    tiny.write_jsonl(folder / "validation.jsonl", tiny.conversations(5, 2))
    prepare(folder / "train.jsonl", folder / "data", folder / "target", validation_dataset=folder / "validation.jsonl",
            chat_template="llama3", max_length=512, num_proc=1)  # fmt: skip
    train(folder, folder / "whole")
    return folder


def arguments(work, output, *flags):
    argv = ["--target_model_path", work / "target", "--data_path", work / "data", "--output_dir", output, *FLAGS]
    return [str(part) for part in (*argv, *flags)]


def train(work, output, *flags):
    train_eagle3.main(train_eagle3.parse_args(arguments(work, output, *flags)))


def rows(output):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def contents(folder):
    """{file: its content} of a checkpoint, tensor by tensor, without what tells the time or the folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name} {key}": tensor for key, tensor in load_file(path).items()}
        elif path.suffix == ".pt":
            found |= flattened(name, torch.load(path, weights_only=False))
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            found |= flattened(name, {key: state[key] for key in state.keys() - {"seconds", "files", "flags"}})
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def flattened(name, value):
    if isinstance(value, dict):
        return {key: leaf for k, v in value.items() for key, leaf in flattened(f"{name} {k}", v).items()}
    if isinstance(value, list | tuple):
        return {key: leaf for k, v in enumerate(value) for key, leaf in flattened(f"{name} {k}", v).items()}
    return {name: value}


def different(a, b):
    """Names of what two folders' contents do not have in common, bit by bit."""
    a, b = contents(a), contents(b)

    def same(x, y):
        if torch.is_tensor(x) and torch.is_tensor(y):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and (isinstance(x, float | int | str | bytes | None) is False or x == y)

    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def at_step(monkeypatch, step, act):
    """Call act() when the training logs or counts step `step`."""
    original = train_eagle3.optimizer_step
    count = []

    def counted(*args, **options):
        result = original(*args, **options)
        count.append(1)
        if len(count) == step:
            act()
        return result

    monkeypatch.setattr(train_eagle3, "optimizer_step", counted)


def test_stopped_by_a_signal_and_resumed_is_the_undisturbed_run(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(work, out)
    assert "stopped behind step 7 by SIGTERM: --resume continues" in capsys.readouterr().out
    assert (out / "latest").resolve().name == "step_00000007" and not (out / "final").exists()
    monkeypatch.undo()
    train(work, out, "--resume")
    assert rows(out) == rows(work / "whole")
    for name in ("step_00000010", "step_00000012", "final"):
        assert [x for x in different(out / name, work / "whole" / name) if "run.json" not in x] == [], name


@pytest.fixture(scope="module")
def starts():
    with Starts() as process:
        yield process


def same_run(a, b, names=("step_00000005", "step_00000010", "step_00000012", "final")):
    assert rows(a) == rows(b)
    for name in names:
        assert [x for x in different(a / name, b / name) if "run.json" not in x] == [], name


def readable(output):
    """Every folder that is called a checkpoint can be loaded."""
    for folder in Path(output).glob("step_*"):
        state = read_state(folder)
        assert state and not damage(folder, state) and check_draft(folder) == [], folder
    for name in ("latest", "best"):
        if (output / name).is_symlink():
            assert (output / name / "config.json").exists(), name


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), [(2, 20), (1, 2), (3, 2)])
def test_killed_again_and_again_and_resumed_is_the_undisturbed_run(work, starts, tmp_path, stage, kills):
    """kill -9 of both ranks at random moments, most of them while a checkpoint is written, as one is due every step."""
    random.seed(stage)
    flags = "--deepspeed_config", tiny.REPOSITORY / "ds_configs" / f"zero{stage}.json", "--save_steps", 1
    flags = *flags, "--total_steps", 60, "--save_total_limit", 4, "--num_workers", 1
    argv = [arguments(work, tmp_path / name, *flags, "--resume") for name in ("whole", "killed")]
    starts.run(argv[0], 2, tmp_path / "log")
    out, done, moments = tmp_path / "killed", 0, set()
    while done < kills:
        starts.start(argv[1], 2, tmp_path / "log")
        before, begun, deadline = len(list(out.glob("step_*"))), None, random.uniform(0, 1.5)
        while begun is None or time.monotonic() - begun < deadline:
            time.sleep(0.01)
            moving = {path.name for path in out.glob(".step_*")} | {path.name for path in out.glob("step_*")}
            begun = begun or (time.monotonic() if len(moving) > before or random.random() < 1e-3 else None)
            assert all(Path(f"/proc/{pid}").exists() for pid in starts.pids)
            if (out / "final").exists():
                break
        assert not (out / "final").exists(), "it was over before it was killed often enough: give it more steps"
        moments.add(max((path.name for path in out.glob("step_*")), default=""))
        starts.kill()
        assert starts.wait() == [-9, -9]
        readable(out)
        done += 1
    starts.run(argv[1], 2, tmp_path / "log")
    assert len(moments) > kills // 3, "the kills came at few different steps"
    same_run(out, tmp_path / "whole", [f"step_{step:08d}" for step in (57, 58, 59, 60)] + ["final"])
