"""Trainings in the tests' own process, and what they leave: metrics, weights, gradients."""

import json
from pathlib import Path

from safetensors.torch import load_file

import train_eagle3
from core import optimization

STEPS = 3  # of the training-time test, in all runs here


def arguments(work, output, *flags, data=True):
    argv = ["--target_model_path", work / "target", "--output_dir", output, "--ttt_length", STEPS, "--log_steps", 1]
    argv += ["--data_path", work / "data"] if data else []
    return [str(part) for part in (*argv, *flags)]


def run(work, output, *flags, data=True):
    """Train in this process; returns the rows of metrics.jsonl."""
    train_eagle3.main(train_eagle3.parse_args(arguments(work, output, *flags, data=data)))
    path = Path(output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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

    def build_engine(args, draft, device):
        engine = build(args, draft, device)
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
