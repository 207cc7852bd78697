"""Runs that are stopped and continued, bit by bit: a run that nothing disturbed, and how others differ from it."""

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from core import checkpoints, draft_files, optimization
from helpers import tiny, training
from helpers.training import timeless as rows

FLAGS = "--draft_global_batch_size", 4, "--total_steps", 12, "--log_steps", 3, "--eval_steps", 4
FLAGS = *FLAGS, "--save_steps", 5, "--save_interval", 99, "--draft_vocab_size", 200, "--learning_rate", 3e-3


def write_work(folder):
    """A workspace with a run in whole/ that nothing disturbed."""
    training.write_workspace(folder)
    train(folder, folder / "whole")
    return folder


def arguments(work, output, *flags):
    return training.arguments(work, output, *FLAGS, *flags)


def train(work, output, *flags):
    training.run(work, output, *FLAGS, *flags)


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
            found |= flattened(
                name, {key: state[key] for key in state.keys() - {"seconds", "spent", "files", "flags", "hash"}}
            )
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
    original = optimization.optimizer_step
    count = []

    def counted(*args, **options):
        result = original(*args, **options)
        count.append(1)
        if len(count) == step:
            act()
        return result

    monkeypatch.setattr(optimization, "optimizer_step", counted)


def check_continued(monkeypatch, work, out, undisturbed, *flags):
    """A training of 4 steps that is asked to stop after the third, and continued, is the undisturbed one bit by bit."""
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(work, out, *flags)
    monkeypatch.undo()
    assert (out / "latest").resolve().name == "step_00000003" and not (out / "final").exists()
    train(work, out, *flags, "--resume")
    assert rows(out) == rows(undisturbed)
    for name in ("step_00000004", "final"):
        assert [x for x in different(out / name, undisturbed / name) if "run.json" not in x] == [], name


def same_run(a, b, names=("step_00000005", "step_00000010", "step_00000012", "final")):
    assert rows(a) == rows(b)
    for name in names:
        assert [x for x in different(a / name, b / name) if "run.json" not in x] == [], name


def readable(output):
    """Every folder that is called a checkpoint can be loaded."""
    for folder in Path(output).glob("step_*"):
        assert checkpoints.open_checkpoint(folder)[1] == "" and draft_files.check_draft(folder) == [], folder
    for name in ("latest", "best"):
        if (output / name).is_symlink():
            assert (output / name / "config.json").exists(), name


def stage(number):
    return "--deepspeed_config", tiny.REPOSITORY / "ds_configs" / f"zero{number}.json"


def spoil(folder):
    """A byte of its largest file is another one."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refused(capsys, work, output, *flags):
    """The one line with which the training ends before its first step."""
    return training.refused(capsys, train, work, output, *flags)
