"""Recipes, run as they are."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from helpers import tiny

SMALL = {
    "DRAFT_VOCAB_SIZE": 200, "VALIDATION_RATIO": 0.1, "NUM_EPOCHS": 1, "TTT_LENGTH": 3, "LOG_STEPS": 1,
    "GLOBAL_BATCH": 8, "REPORT_TO": "none", "OMP_NUM_THREADS": 1,
}  # fmt: skip
# Before the launcher on PATH: another recipe may run at the same time, and the launcher's own port is always the same.
LAUNCHER = """#!/bin/bash
exec {launcher} --master_port {port} "$@"
"""


def run(script, timeout, *flags, **environment):
    """Run an example with these flags and variables, in the environment of the tests; returns what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = Path(folder) / "deepspeed"
        launcher.write_text(LAUNCHER.format(launcher=shutil.which("deepspeed"), port=tiny.free_port()))
        launcher.chmod(0o755)
        environment["PATH"] = f"{folder}:{environment.get('PATH', os.environ['PATH'])}"
        # Beside other tests two threads that spin while they wait for each other would take a multiple of the time.
        variables = tiny.environment(EAGLE3_VENV="none", OMP_WAIT_POLICY="PASSIVE", **environment)
        command = ["bash", str(tiny.REPOSITORY / "examples" / script), *flags]
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def tells_acceptance(folder, printed):
    """Whether the training said what it measured on the validation rows."""
    rows = [json.loads(line) for line in (folder / "draft" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["split"] == "validation"]
    end = f"acceptance_length {row['acceptance_length']:.3f}"
    start = f"evaluation at step {row['step']} | "
    return sum(line.startswith(start) and line.endswith(end) for line in printed.splitlines()) == 1
