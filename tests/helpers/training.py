"""A workspace, trainings on it in the tests' own process, and what they leave: metrics, weights, gradients."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import prepare_data
import train_eagle3
from core import optimization
from helpers import tiny

STEPS = 3  # of the training-time test, unless a test asks for others
TIMES = ("seconds", "tokens_per_second")  # of the clock: the same run has others


def write_workspace(folder, train=None, validation=None, **options):
    """target/, train.jsonl, validation.jsonl, and both prepared in data/; options are those of tiny.write_target.

    Without rows: conversations of very different lengths. validation=(): there is none.
    """
    tiny.write_target(folder / "target", **options)
    tiny.write_jsonl(folder / "train.jsonl", train or tiny.conversations(19, 1) + tiny.conversations(3, 4))
    if validation is None:
        validation = tiny.conversations(5, 2)
    given = {"max_length": 512, "num_proc": 1}
    if validation:
        given["validation_dataset"] = tiny.write_jsonl(folder / "validation.jsonl", validation)
    prepare_data.prepare(folder / "train.jsonl", folder / "data", folder / "target", **given)
    return folder


def arguments(work, output, *flags, data=True):
    """The trainer's command line on a workspace; what comes later in flags counts."""
    argv = ["--target_model_path", work / "target", "--output_dir", output, "--ttt_length", STEPS, "--log_steps", 1]
    argv += ["--data_path", work / "data"] if data else []
    return [str(part) for part in (*argv, *flags)]


def flags(*given):
    """The trainer's flags by name, as the objective takes them."""
    return train_eagle3.parse_args(["--target_model_path", "target", *map(str, given)])


def run(work, output, *flags, data=True):
    """Train in this process; returns the rows of metrics.jsonl."""
    train_eagle3.main(train_eagle3.parse_args(arguments(work, output, *flags, data=data)))
    return metrics(output)


def metrics(output):
    """The rows of metrics.jsonl; none after a dry run."""
    path = Path(output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(output):
    """The rows of metrics.jsonl without what the clock says."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics(output)]


def refused(capture, call, *args, **options):
    """The one line, without `error: `, that a call ends with; capture: capsys or capfd."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args, **options)
    printed = capture.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1, printed
    return lines[0].removeprefix("error: ")


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def furthest(a, b):
    """Largest relative difference between two drafts, tensor by tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp(min=1e-30)) for k in a)


def recorded_gradients(work, tmp_path, monkeypatch, *flags):
    """Full gradients of the first optimizer step, by name."""
    from deepspeed.utils import safe_get_full_grad

    found, build = {}, optimization.build_engine

    def build_engine(*args):
        engine = build(*args)
        step = engine.step

        def recording_step():
            if engine.is_gradient_accumulation_boundary() and not found:
                found.update({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})
            step()

        engine.step = recording_step
        return engine

    with monkeypatch.context() as patch:
        patch.setattr(optimization, "build_engine", build_engine)
        run(work, tmp_path, "--total_steps", 1, "--draft_global_batch_size", 4, *flags)
    return found
