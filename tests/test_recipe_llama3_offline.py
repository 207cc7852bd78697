"""The recipe of hidden states on disk with a small target."""

import json
import subprocess

import pytest

from core import draft_files
from helpers import tiny
from helpers.recipes import run


@pytest.mark.slow
def test_llama3_offline_recipe_with_a_small_target(tmp_path):
    """Both stages one by one: the second finds no weights of the target's layers, and needs none."""
    target = tiny.write_target(tmp_path / "target", max_shard_size="60KB")
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.conversations(40, 2))
    variables = {
        "OUTPUT": tmp_path / "out", "TARGET": target, "NUM_GPUS": 2, "DATASET": tmp_path / "chats.jsonl",
        "DRAFT_VOCAB_SIZE": 200, "VALIDATION_RATIO": 0.1, "NUM_EPOCHS": 1, "TTT_LENGTH": 3, "NUM_PROMPTS": 2,
        "MAX_NEW_TOKENS": 12, "LOG_STEPS": 1, "OMP_NUM_THREADS": 1, "HIDDEN_STATES": tmp_path / "disk" / "states",
    }  # fmt: skip
    printed = run("run_llama3_offline.sh", 600, **variables, STAGES="states", HIDDEN_STATES_DTYPE="fp8", MAX_DISK=1)
    assert "40 of 40 rows to write" in printed and "40 rows" in printed.split("=== 1b")[1]
    index = json.loads((tmp_path / "disk" / "states" / "index.json").read_text())
    assert index["dtype"] == "fp8" and sum(map(len, index["shards"].values())) == 40
    again = run("run_llama3_offline.sh", 600, **variables, STAGES="states", HIDDEN_STATES_DTYPE="fp8")
    assert "0 of 40 rows to write" in again
    printed = run("run_llama3_offline.sh", 900, **variables, STAGES="train")
    assert "40 of 40 rows are there" in printed and "head and embedding alone" in printed and "=== 1" not in printed
    assert draft_files.check_draft(tmp_path / "out" / "draft" / "final") == []
    assert (tmp_path / "out" / "evaluation" / "acceptance.png").exists()


def test_offline_recipe_refuses_an_unknown_stage():
    script = tiny.REPOSITORY / "examples" / "run_llama3_offline.sh"
    variables = tiny.environment(EAGLE3_VENV="none", STAGES="both")
    done = subprocess.run(["bash", script], env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "error: STAGES is both: choose states, train or all\n")
