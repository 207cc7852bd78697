"""The record of a run: run.json, metrics.jsonl, the trackers, and the lines on the terminal.

In:  what training measures, on rank 0.
Out: output_dir/run.json (what was run, with what, on what) and output_dir/metrics.jsonl (a row per logged step and per
     evaluation), which a resumed run continues: rows behind the checkpoint are dropped, as their steps come again.

train_eagle3.py imports this file; it is not run itself.
"""

import datetime
import errno
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from prepare_data import write_atomic

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors", "accelerate")


def run_settings(args, data_config, step):
    """run.json of a start that goes on behind `step`; what an earlier one said stays under "earlier_starts"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    path, earlier = Path(args.output_dir) / "run.json", []
    if step and path.exists():
        before = json.loads(path.read_text())
        earlier = [*before.pop("earlier_starts", []), before]
    return {
        "argv": sys.argv,
        "flags": vars(args),
        "versions": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git.stdout.strip() if git else None,
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "data_fingerprint": data_config["fingerprint"],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run_id": earlier[0]["run_id"] if earlier else os.urandom(8).hex(),
        "starts_behind_step": step,
        "earlier_starts": earlier,
    }


def open_swanlab(args, settings):
    import swanlab

    run = swanlab.init(
        project="eagle3", name=args.run_name, log_dir=args.log_dir, config=settings, id=settings["run_id"],
        resume="allow",
    )  # fmt: skip
    return lambda values, step: run.log(values, step=step), run.finish


def open_tensorboard(args, settings):
    from torch.utils.tensorboard import SummaryWriter

    step = settings["starts_behind_step"]  # what an interrupted start wrote of later ones is not shown
    folder = str(Path(args.log_dir) / (args.run_name or "tensorboard"))
    writer = SummaryWriter(folder, purge_step=step + 1)
    writer.add_text("settings", "```\n" + json.dumps(settings, indent=2) + "\n```", step)

    def log(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


TRACKERS = {"swanlab": open_swanlab, "tensorboard": open_tensorboard}


class Record:
    """Where measured values go on rank 0: metrics.jsonl, the trackers, the terminal. Elsewhere it does nothing."""

    def __init__(self, args, settings):
        self.first, step = dist.get_rank() == 0, settings["starts_behind_step"]
        if self.first:
            path, self.trackers = Path(args.output_dir) / "metrics.jsonl", {}
            rows = path.read_text().splitlines(keepends=True) if step and path.exists() else []
            # The last line may have been cut off: its step comes again then.
            write_atomic(path, "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step))
            self.file, self.unwritten = path.open("ab", buffering=0), b""
            self.attempt(args.report_to, lambda name: self.trackers.update({name: TRACKERS[name](args, settings)}))
            self.bar = tqdm(
                total=args.total_steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
            )

    def attempt(self, names, work):
        """Foreign code and accounts must not cost the training: a tracker that fails is reported and left out."""
        for name in list(names):
            try:
                work(name)
            except Exception as error:
                print(f"{name} fails, training goes on without it: {error}", file=sys.stderr)
                self.trackers.pop(name, None)

    def row(self, split, step, epoch, values):
        if self.first:
            values = {name: float(f"{x:.9g}") if isinstance(x, float) else x for name, x in values.items()}
            row = {"split": split, "step": step, "epoch": round(epoch, 6), **values}
            self.unwritten += f"{json.dumps(row)}\n".encode()
            if problem := self.write():
                print(f"{problem}; the rows are kept in memory", file=sys.stderr)
            values = {f"{split}/{name}": value for name, value in values.items() if value is not None}
            self.attempt(self.trackers, lambda name: self.trackers[name][0](values, step))

    def write(self, sync=False):
        """Append the rows that are not written yet, all of them or none. Returns "" or why that is not possible."""
        size = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(self.unwritten) < len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            self.file.truncate(size)
            return f"{self.file.name} cannot be written: {error.strerror}"
        self.unwritten = b""
        return ""

    def keep(self):
        """Bring the rows to the disk, as a checkpoint relies on them. Returns "" or why that is not possible."""
        return self.write(sync=True) if self.first else ""

    def line(self, text):
        if self.first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        if self.first:
            self.bar.close()
            if problem := self.write():
                print(f"{problem}: its last rows are lost", file=sys.stderr)
            self.file.close()
            self.attempt(self.trackers, lambda name: self.trackers[name][1]())


def metrics_line(values, steps):
    """The part of a printed line that training and evaluation share."""
    accuracy = " ".join(f"{values[f'acc_{i}']:.3f}" for i in range(steps))
    return f"loss {values['loss']:.4f} | acc {accuracy} | chain_length {values['chain_length']:.3f}"
